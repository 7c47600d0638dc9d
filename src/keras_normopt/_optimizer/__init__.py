"""Where the package meets Keras: the generated optimizer classes."""
