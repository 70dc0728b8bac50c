"""The Latent Perceptual Loss, for any training loop; it knows nothing of trainers."""
