"""What a family of networks is to `accelerate`, and which there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

Classes = dict[type[nn.Module], type[nn.Module]]

# A module of theirs whose classes are known -> the file here that knows them.
FAMILIES = {
    "aurora.model.swin3d": "aurora",
    "boltz.model.layers.triangular_attention.attention": "boltz",
    "monai.networks.nets.swin_unetr": "monai",
    "sam2.modeling.backbones.hieradet": "sam2",
    "spandrel.architectures.DAT.__arch.DAT": "spandrel_dat",
    "spandrel.architectures.DRCT.__arch.drct_arch": "spandrel_drct",
    "spandrel.architectures.HAT.__arch.HAT": "spandrel_hat",
    "spandrel.architectures.OmniSR.__arch.OSA": "spandrel_omnisr",
    "spandrel.architectures.Swin2SR.__arch.Swin2SR": "spandrel_swin2sr",
    "spandrel.architectures.SwinIR.__arch.SwinIR": "spandrel_swinir",
    "spandrel.architectures.Uformer.__arch.Uformer": "spandrel_uformer",
    "timm.models.hiera": "timm_hiera",
    "timm.models.hieradet_sam2": "timm_hiera",
    "timm.models.maxxvit": "timm",
    "timm.models.swin_transformer": "timm",
    "timm.models.swin_transformer_v2": "timm_swinv2",
    "timm.models.swin_transformer_v2_cr": "timm_swinv2",
    "torchvision.models.maxvit": "torchvision",
    "torchvision.models.swin_transformer": "torchvision",
    "torchvision.models.video.swin_transformer": "torchvision",
    "transformers.models.clap.modeling_clap": "transformers_clap",
    "transformers.models.donut.modeling_donut_swin": "transformers_donut",
    "transformers.models.hiera.modeling_hiera": "transformers_hiera",
    "transformers.models.maskformer.modeling_maskformer_swin": "transformers_maskformer",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl": "transformers_qwen",
    "transformers.models.sam2.modeling_sam2": "transformers_sam2",
    "transformers.models.swin.modeling_swin": "transformers_swin",
    "transformers.models.swin2sr.modeling_swin2sr": "transformers_swin2sr",
    "transformers.models.swinv2.modeling_swinv2": "transformers_swinv2",
}

# A package -> the oldest and the newest version on which networks were compared with its own.
VERSIONS = {
    "aurora": ("2.0.1", "2.0.1"),
    "boltz": ("2.2.1", "2.2.1"),
    "monai": ("1.5.0", "1.6.1"),
    "sam2": ("1.1.0", "1.1.0"),
    "spandrel": ("0.4.2", "0.4.2"),
    "timm": ("1.0.3", "1.0.31"),
    "torchvision": ("0.29.1", "0.29.1"),
    "transformers": ("5.11.0", "5.24.0"),
}


@dataclass(frozen=True)
class Family:
    """Classes of theirs and ours.

    Attributes:
        blocks: what is taken, theirs -> ours: a subclass that overrides what makes windows of a map.
        attentions: the modules in a block that are told of partitions, theirs -> ours.
        inside: their names in a block, as "blocks.*.attn"; it is left where a module of another class stands there.
        holders: modules that hold blocks and prepare what those of theirs need, such as masks, theirs -> ours.
        left: other classes that attend in windows and stay theirs -> why.
        partly: blocks of which some calls stay theirs -> which, and why.
        added: names of methods of our blocks that theirs have not.
    """

    blocks: Classes
    attentions: Classes = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    holders: Classes = field(default_factory=dict)
    left: dict[type[nn.Module], str] = field(default_factory=dict)
    partly: dict[type[nn.Module], str] = field(default_factory=dict)
    added: tuple[str, ...] = ()

    def ours(self, module: nn.Module) -> type[nn.Module]:
        """Our class for a module of theirs, or of ours."""
        return self._classes.get(type(module), type(module))

    def theirs(self, module: nn.Module) -> type[nn.Module] | None:
        """Their class for a module of ours."""
        classes = {ours: theirs for theirs, ours in self._classes.items()}
        return classes.get(type(module))

    def takes(self, module: nn.Module) -> bool:
        """Whether a module is a block, theirs or ours, and its attention too; no subclass: it may do something else."""
        return _is_of(module, self.blocks) and not self._strange(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is a holder, theirs or ours, of blocks that are taken."""
        return _is_of(module, self.holders) and any(map(self.takes, module.modules()))

    def attentions_of(self, block: nn.Module) -> list[nn.Module]:
        """What stands in a block under the names that attention has there."""
        modules = block.named_modules(remove_duplicate=False)
        return [module for name, module in modules if any(fnmatchcase(name, pattern) for pattern in self.inside)]

    def finding(self, module: nn.Module) -> tuple[str, bool, str] | None:
        """The class of a module that is known, whether it is accelerated, and why not."""
        if type(module) in self.left:
            return type(module).__name__, False, self.left[type(module)]
        if (theirs := self.theirs(module)) and type(module) in self.blocks.values():
            return theirs.__name__, True, self.partly.get(theirs, "")
        if type(module) in self.blocks:
            strange = self._strange(module)
            return type(module).__name__, False, f"its attention is {strange[0]}" if strange else "not accelerated"
        if isinstance(module, tuple(self.blocks)):
            base = next(theirs for theirs in self.blocks if isinstance(module, theirs))
            return type(module).__name__, False, f"a subclass of {base.__name__}, which may do something else"
        return None

    @property
    def _classes(self) -> Classes:
        return self.blocks | self.attentions | self.holders

    def _strange(self, block: nn.Module) -> list[str]:
        """The classes of what stands in the place of attention and is not."""
        return [type(x).__name__ for x in self.attentions_of(block) if not _is_of(x, self.attentions)]


def _is_of(module: nn.Module, classes: Classes) -> bool:
    return type(module) in classes or type(module) in classes.values()
