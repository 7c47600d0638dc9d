# Made by tests/typing/make_stubs.py.

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import keras

from keras_normopt.mixin import Normalization

# `str` is a registered name of one's own; the literals are there to be completed.
Norm: TypeAlias = (
    Literal[
        "avg_l1",
        "avg_l1_l2",
        "avg_l2",
        "l1",
        "l1_l2",
        "l2",
        "linf",
        "max",
        "min_max",
        "std",
    ]
    | str
    | Callable[[Any], Any]
    | None
)

ALIASES: dict[str, type[Normalization]]

__all__ = [
    "NormalizedSGD",
    "NormalizedAdam",
    "NormalizedAdamW",
    "NormalizedRMSprop",
    "NormalizedAdagrad",
    "NormalizedAdadelta",
    "NormalizedAdamax",
    "NormalizedNadam",
    "NormalizedFtrl",
    "NormalizedLion",
    "NormalizedAdafactor",
    "NormalizedLamb",
    "NormalizedMuon",
    "NormalizedScheduleFreeAdamW",
]

class NormalizedSGD(Normalization, keras.optimizers.SGD):
    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: Any = 0.0,
        nesterov: Any = False,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedAdam(Normalization, keras.optimizers.Adam):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-07,
        amsgrad: Any = False,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedAdamW(Normalization, keras.optimizers.AdamW):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: Any = 0.004,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-07,
        amsgrad: Any = False,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedRMSprop(Normalization, keras.optimizers.RMSprop):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.9,
        momentum: Any = 0.0,
        epsilon: Any = 1e-07,
        centered: Any = False,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedAdagrad(Normalization, keras.optimizers.Adagrad):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        initial_accumulator_value: Any = 0.1,
        epsilon: Any = 1e-07,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedAdadelta(Normalization, keras.optimizers.Adadelta):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.95,
        epsilon: Any = 1e-07,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedAdamax(Normalization, keras.optimizers.Adamax):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-07,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedNadam(Normalization, keras.optimizers.Nadam):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-07,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedFtrl(Normalization, keras.optimizers.Ftrl):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        learning_rate_power: Any = -0.5,
        initial_accumulator_value: Any = 0.1,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        l2_shrinkage_regularization_strength: Any = 0.0,
        beta: Any = 0.0,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedLion(Normalization, keras.optimizers.Lion):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.99,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedAdafactor(Normalization, keras.optimizers.Adafactor):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_2_decay: Any = -0.8,
        epsilon_1: Any = 1e-30,
        epsilon_2: Any = 0.001,
        clip_threshold: Any = 1.0,
        relative_step: Any = True,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedLamb(Normalization, keras.optimizers.Lamb):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-07,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedMuon(Normalization, keras.optimizers.Muon):
    def __init__(
        self,
        learning_rate: Any = 0.001,
        adam_beta_1: Any = 0.9,
        adam_beta_2: Any = 0.999,
        adam_weight_decay: Any = 0.004,
        epsilon: Any = 1e-07,
        weight_decay: Any = 0.004,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        exclude_layers: Any = None,
        exclude_embeddings: Any = True,
        muon_a: Any = 3.4445,
        muon_b: Any = -4.775,
        muon_c: Any = 2.0315,
        adam_lr_ratio: Any = 1,
        momentum: Any = 0.95,
        ns_steps: Any = 5,
        nesterov: Any = True,
        rms_rate: Any = 0.2,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...

class NormalizedScheduleFreeAdamW(Normalization, keras.optimizers.ScheduleFreeAdamW):
    def __init__(
        self,
        learning_rate: Any = 0.0025,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-08,
        warmup_steps: Any = 0,
        weight_decay: Any = None,
        clipnorm: Any = None,
        clipvalue: Any = None,
        global_clipnorm: Any = None,
        use_ema: Any = False,
        ema_momentum: Any = 0.99,
        ema_overwrite_frequency: Any = None,
        loss_scale_factor: Any = None,
        gradient_accumulation_steps: Any = None,
        name: Any = None,
        *,
        norm: Norm = "l2",
        norm_epsilon: float = 1e-30,
        **kwargs: Any,
    ) -> None: ...
