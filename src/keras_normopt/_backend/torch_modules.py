"""Finds which module of PyTorch a parameter belongs to."""

import keras

if keras.backend.backend() == "torch":
    from torch import nn

    _NO_MATRIX = (
        nn.modules.batchnorm._NormBase,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.RMSNorm,
        nn.PReLU,
    )
    _TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    _CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    _GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
    _GATES |= {nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}

    def find(module, parameter):
        """Finds what a parameter of a module, or of a module inside, does.

        Returns:
            `None` if its module is unknown, or a tuple of `"kernel"`, `"swapped"`,
            `"embedding"` or `"vector"`, and into how many parts the outputs are split.
        """
        for inner in module.modules():
            for name, own in inner.named_parameters(recurse=False):
                if own is parameter:
                    return _of_module(inner, name, parameter)
        return None

    def _of_module(module, name, parameter):
        if "bias" in name or isinstance(module, _NO_MATRIX):
            return "vector", 1
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return "embedding", 1
        if isinstance(module, nn.Linear | nn.Bilinear):
            return "kernel", 1
        if isinstance(module, _CONVOLUTIONS):
            return "kernel", module.groups
        if isinstance(module, _TRANSPOSED) and module.groups == 1:
            return "swapped", 1
        if isinstance(module, nn.MultiheadAttention):
            return "kernel", 3 if name == "in_proj_weight" else 1
        for cls, gates in _GATES.items():
            if isinstance(module, cls):
                # An LSTM may project its state.
                return "kernel", 1 if name.startswith("weight_hr") else gates
        return None

else:

    def find(module, parameter):
        """Finds nothing: only PyTorch has such modules."""
        return
