"""Finds the roles of parameters in PyTorch modules."""

import keras

if keras.backend.backend() == "torch":
    from torch import nn
    from torch.nn.utils import parametrize

    _VECTOR_MODULES = (
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

    def find_role(module, parameter):
        """Finds the role of a parameter in a module or its submodules.

        Returns:
            A tuple `(role, parts, name)`. The role is `"kernel"`, `"swapped"`,
            `"depthwise"`, `"embedding"`, `"vector"`, or `None` if unknown. The outputs
            are split into `parts`. The name is the parameter's name in its module.
        """
        found = [
            (*_role_in(inner, name, parameter), name)
            for inner in module.modules()
            for name, own in _parameters(inner)
            if own is parameter
        ]
        # A tied table counts as an embedding.
        found.sort(key=lambda f: (f[0] != "embedding", f[0] is None))
        return found[0] if found else (None, 1, "")

    def _parameters(module):
        """Yields names and parameters. The parts of a weight have the weight's name."""
        if isinstance(module, parametrize.ParametrizationList):
            return
        yield from module.named_parameters(recurse=False)
        if parametrize.is_parametrized(module):
            for name, parts in module.parametrizations.items():
                own = list(parts.parameters(recurse=False))
                largest = max((p.numel() for p in own), default=0)
                for part in own:
                    # A smaller part is a gain, as in `weight_norm`.
                    yield name if part.numel() == largest else f"{name}_gain", part

    def _role_in(module, name, parameter):
        """Returns the role and the number of parts of a parameter."""
        if isinstance(module, _VECTOR_MODULES):
            return "vector", 1
        for cls, gates in _GATES.items():
            if isinstance(module, cls) and name.startswith("weight"):
                # The projection of an LSTM's state has no gates.
                return "kernel", 1 if name.startswith("weight_hr") else gates
        if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
            return "kernel", 3 if name == "in_proj_weight" else 1
        if name not in ("weight", "weight_v"):
            return "vector" if name == "weight_g" else None, 1
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return "embedding", 1
        if isinstance(module, nn.Linear | nn.Bilinear):
            return "kernel", 1
        if isinstance(module, _CONVOLUTIONS):
            return "kernel", module.groups
        if isinstance(module, _TRANSPOSED) and module.groups == 1:
            return "swapped", 1
        if isinstance(module, _TRANSPOSED) and module.groups == module.in_channels:
            return "depthwise", 1
        return None, 1

else:

    def find_role(module, parameter):
        """Finds nothing: only PyTorch has these modules."""
        return None, 1, ""
