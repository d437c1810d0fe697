"""Networks that use the layers, and networks of others made to use them.

block        ISA in residual form, and how to insert it into any network
resnet       torchvision's ResNets with such blocks
ianet        the paper's segmentation network
hrformer     HRFormer's attention, whose published weights load
accelerated  window attention in networks of others: `accelerate`, `restore`, `report`
"""

from .accelerated import accelerate, report, restore

__all__ = ["accelerate", "report", "restore"]
