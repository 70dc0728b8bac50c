"""What a run needs and what it does, counted or measured."""
