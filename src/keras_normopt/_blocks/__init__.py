"""Variables become blocks, and the gradients of one step are taken block by block."""
