"""`lpl check`: what can be known of the model, its VAE, the gate, the weight and a step's cost before a run."""
