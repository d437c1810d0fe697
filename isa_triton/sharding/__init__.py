"""One map over several devices: every device holds some of its rows, and attention still reaches every pixel.

Whatever acts on single pixels stays where the rows lie. Windows never cross a cut at a multiple of P_h. Interlaced
groups do not depend on each other, so each goes to one device as a whole: one all-to-all before long-range attention,
one after it. Groups are shared out by the residues of their rows and columns,

    device = the owner of (y mod P_h, x mod P_w),    which owns residues [a, b) x [c, d),

and the pixels of such a rectangle of residues, in the order in which they lie, are a smaller map whose interlaced
partition has the stride (b - a, d - c): attention runs there unchanged (Huang et al., arXiv 1907.12273, section 3.2).

Everything rests on `torch.distributed`: maps and parameters are DTensors, exchanges are functional collectives.
"""

from .norm import ShardedBatchNorm2d
from .parallel import MapParallel

__all__ = ["MapParallel", "ShardedBatchNorm2d"]
