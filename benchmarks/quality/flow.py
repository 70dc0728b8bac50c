"""The stage flow: the same small network trained by flow matching, with and without LPL.

The kept pretrained UNet is trained on with noise - latents as its target (`flow` of arms.yaml says how far) and kept as
flow_unet.safetensors; text encoders and VAE stay. Its arms begin there. Their rows have names with FLOW in front.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.quality.arms import Options, Run, merged
from benchmarks.quality.kept import FLOW_UNET, as_flow, keep_flow, kept_flow_steps, kept_pipeline
from benchmarks.quality.stages import ARMS, Stages
from benchmarks.quality.summary import FLOW
from lpl.base.errors import UserError


@dataclass
class FlowStages(Stages):
    """Its benchmark is arms.yaml's with `flow` in the place of the other arms."""

    def __post_init__(self) -> None:
        flow, points = self.benchmark.flow, self.benchmark.points["flow"]
        self.benchmark = replace(
            self.benchmark,
            points={"search": replace(points, to_best=False), "report": points},
            steps=flow.steps,
            seeds=flow.seeds,
            baseline=flow.baseline,
            lpl=flow.lpl,
            controls={},
        )

    def flow(self) -> None:
        """Pretraining, the search of LPL's options, and the reported runs; LPL's default is one of them."""
        how, points, seed = self.benchmark.flow, self.benchmark.points, self.benchmark.pretraining.seed
        pretrained = Run(f"{FLOW}pretrained", seed, False, how.pretraining_steps, how.pretraining)
        if kept_flow_steps(self.weights) != how.pretraining_steps:
            trained = self._train(pretrained, self._begun())
            keep_flow(trained, self.weights, how.pretraining_steps)
        self._measure(pretrained, self._base(), points["search"], None)
        best = {name: self._best(name) for name in ARMS}
        default = merged(best["baseline"], how.default)
        best |= {"lpl-default": default} if default != best["lpl"] else {}
        self.results.note("flow_best", best)
        runs = [self._run(arm, seed, options) for seed in self.benchmark.seeds for arm, options in best.items()]
        self._map(runs, points["report"])

    def _run(self, arm: str, seed: int, options: Options, reported: bool = True) -> Run:
        return replace(super()._run(arm, seed, options, reported), arm=f"{FLOW}{arm}")

    def _begun(self) -> Path:
        """The pretrained pipeline with a scheduler of flow matching."""
        return self._written(f"{super()._base().name}_flow", lambda: as_flow(kept_pipeline(self.weights)))

    def _base(self) -> Path:
        """The pipeline that the arms of flow matching begin with."""
        super()._base()
        if kept_flow_steps(self.weights) is None:
            raise UserError(f"{self.weights / FLOW_UNET}: is not there: run --stage flow first")
        name = f"flow_{self._fixed('flow_weights', [self.weights / FLOW_UNET])}"
        return self._written(name, lambda: as_flow(kept_pipeline(self.weights), self.weights))
