"""The interface of everything that `norm=` can stand for."""


class Norm:
    """Measures blocks of gradients, and normalizes them.

    Args:
        function: Callable from a gradient to its norm.
    """

    #: Whether `measure` takes several equal blocks side by side in one `Reductions`.
    takes_stacks = False

    def __init__(self, function):
        self.function = function

    def measure(self, blocks, unit=None):
        """Computes the norm of each block.

        Args:
            blocks: Non-empty list of `Reductions`.
            unit: Scalar tensor or `None`. The entries are divided by it first.

        Returns:
            The norms of the blocks, as `pack` packs them.
        """
        raise NotImplementedError

    def normalize(self, gradients, divisors):
        """Divides each block by its norm.

        Args:
            gradients: The `Gradients`.
            divisors: Function from the norms to the numbers to divide by.
        """
        gradients.divide(divisors(gradients.norms(self)))

    @property
    def tracked(self):
        """The norm that `track_norms` shows."""
        return self

    def require_norm(self, norm, reason):
        """Raises a `ValueError` if this is not a norm but returns the gradient.

        Args:
            norm: What the user passed as `norm`.
            reason: Why a norm is needed, for the message.
        """

    def check(self, blocks, variables):
        """Raises an error if the norm returns wrong numbers for such variables."""
