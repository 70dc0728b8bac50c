"""The embedded default: photographs and a small SDXL with its shipped weights.

`weights` holds a StableDiffusionXLPipeline scaled down: two text encoders, a UNet with SDXL's conditioning (3.1 M
parameters) and a four-block autoencoder of stride 8 with 16 latent channels (1.8 M), for 64-pixel images, in bfloat16,
10.7 MB. They were trained by tools/demo_weights of the repository (`make demo-weights`) on crops of 13 photographs that
scikit-image and scikit-learn ship: the autoencoder on L1, squared error and early features of a pre-trained
EfficientNet-Lite0, then its decoder alone, and the base UNet with both text encoders on its latents. A strip of each
photograph was held out: its crops are reconstructed at 30.7 dB PSNR on average (19.9 to over 35 dB; fine texture is
smoothed away), tests demand at least 25.
"""
