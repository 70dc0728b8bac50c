"""Images and captions: where they come from, how they are cropped, cached and drawn."""
