"""What is done to the gradients of one step, one file for each."""
