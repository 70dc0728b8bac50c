#!/bin/bash
# SDXL on 2 machines of 8 GPUs: sbatch slurm.sh
#SBATCH --job-name=lpl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300        # five minutes before the time is up: a checkpoint is written
#SBATCH --requeue
#SBATCH --open-mode=append

# Every machine must see these folders.
export OUTPUT=$HOME/runs/$SLURM_JOB_NAME IMAGES=$HOME/images CACHE=$HOME/lpl-cache
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
lpl presets fsdp2 > "accelerate-$SLURM_JOB_ID.yaml"

# After SIGTERM the launcher waits so many seconds for its processes to write the checkpoint (30 unless told).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270
srun --kill-on-bad-exit=0 bash -c "exec accelerate launch --config_file accelerate-$SLURM_JOB_ID.yaml \
    --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * 8)) --machine_rank \$SLURM_NODEID \
    --main_process_ip $head --main_process_port 29500 \
    -m lpl train --config sdxl --train_data_dir $IMAGES --output_dir $OUTPUT --latent_cache_dir $CACHE"

# Goes on where it was stopped: where the run has not ended, and this job has got further.
if [ ! -f "$OUTPUT/finished.json" ] &&
    [ -n "$(find "$OUTPUT" -maxdepth 1 -name 'checkpoint-*' -newer "accelerate-$SLURM_JOB_ID.yaml")" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
