"""`lpl check`: what can be known before a run of the model, its VAE, the gate, the weight and the cost of a step."""
