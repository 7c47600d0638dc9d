"""The interface of all norms that `norm=` accepts."""


class Norm:
    """The base class of norms. A norm measures and normalizes blocks of gradients.

    Args:
        function: Callable from a gradient to its norm.
    """

    #: Whether one `Reductions` in `measure` may stack several blocks of equal shape.
    takes_stacks = False

    def __init__(self, function):
        self.function = function

    def measure(self, blocks, divisor=None):
        """Computes the norm of each block.

        Args:
            blocks: Non-empty list of `Reductions`.
            divisor: Scalar tensor that divides the entries before the norm, or `None`.

        Returns:
            The packed norms: see `pack`.
        """
        raise NotImplementedError

    def normalize(self, gradients, divisors):
        """Divides each block by its norm.

        Args:
            gradients: The `Gradients`.
            divisors: Callable from the norms to the divisors.
        """
        gradients.divide(divisors(gradients.norms(self)))

    @property
    def tracked(self):
        """The norm that `track_norms` shows."""
        return self

    def require_norm(self, norm, reason):
        """Raises a `ValueError` if the function does not return a norm.

        Args:
            norm: What the user passed as `norm`.
            reason: Why a norm is needed, for the message.
        """

    def check(self, blocks, variables):
        """Raises an error if the norm returns invalid numbers for these variables."""
