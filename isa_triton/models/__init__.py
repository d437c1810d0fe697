"""Networks that use the layers, and networks of others made to use them.

block    ISA in residual form, and how to insert it into any network
resnet   torchvision's ResNets with such blocks
ianet    the paper's segmentation network
timm     timm's MaxViT and Swin, accelerated
"""
