"""What ends an execution."""


class Fault(Exception):
    """The kernel does what a GPU would not forgive, or would forgive by luck."""


class Unsupported(NotImplementedError):
    """The machine does not know an instruction, a modifier of it, or so many operands."""
