"""Training and evaluating a segmentation network: recipes, data, the run itself, mean IoU."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says what would be valid."""
