"""LeNet from end to end: train it, run the pipeline with its weights, ask a linear probe what the stored maps know."""
