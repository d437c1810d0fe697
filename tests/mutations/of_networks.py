"""Mistakes in networks of others, accelerated."""

from importlib.util import find_spec

from tests.mutations.defect import Defect

HERE = "isa_triton/models/accelerated/"
SAME = "test_is_the_same_function"

ALL = (
    Defect(
        "attention weights side by side are not dropped",
        f"{HERE}windows.py",
        "attn_mask=mask, dropout_p=_dropout_p(attn)",
        "attn_mask=mask",
        "test_models_torchvision.py::test_attention_weights_are_dropped_as_often_as_by_torchvision",
    ),
    Defect(
        "the weights of zeros behind a map are dropped at once, or not",
        f"{HERE}windows.py",
        " or _dropout_p(attn) > 0:",
        ":",
        "test_models_windows.py::test_the_weight_of_every_zero_is_dropped_by_itself",
    ),
    Defect(
        "MONAI's bias of a query and a key is that of the key and the query",
        f"{HERE}monai.py",
        "[:n, :n]",
        "[:n, :n].T",
        f"test_accelerated.py::{SAME}[monai Swin UNETR, volumes (16, 8, 16)]",
    ),
    Defect(
        "timm's SwinV2 has a bias of keys",
        f"{HERE}timm_swinv2.py",
        "(self.q_bias, self.k_bias, self.v_bias)",
        "(self.q_bias, self.q_bias, self.v_bias)",
        f"test_accelerated.py::{SAME}[timm SwinV2 (64, 96)]",
    ),
    Defect(
        "torchvision's MaxViT has windows for grids",
        f"{HERE}torchvision.py",
        "grid(extent, extent // self.p)",
        "local(extent, extent // self.p)",
        f"test_accelerated.py::{SAME}[torchvision MaxViT (112, 112)]",
    ),
    Defect(
        "SwinV2's position bias of transformers is half",
        f"{HERE}transformers_windows.py",
        "16 * torch.sigmoid(table)",
        "8 * torch.sigmoid(table)",
        f"test_accelerated.py::{SAME}[transformers SwinV2 (64, 96)]",
    ),
    Defect(
        "windows of transformers' Swin stay as they were made",
        f"{HERE}transformers_swin.py",
        "if not always_partition:",
        "if always_partition:",
        "test_models_transformers.py::test_windows_stay_as_small_as_a_map_was",
    ),
    Defect(
        "spandrel's windows are not shifted",
        f"{HERE}restoration.py",
        "local(extent, self.window_size, self.shift_size)",
        "local(extent, self.window_size)",
        f"test_accelerated.py::{SAME}[spandrel SwinIR (16, 16)]",
    ),
    Defect(
        "spandrel's bias of keys and queries",
        f"{HERE}restoration.py",
        "view(*index.shape, -1).permute(2, 0, 1)",
        "view(*index.shape, -1).permute(2, 1, 0)",
        f"test_accelerated.py::{SAME}[spandrel HAT (16, 16)]",
    ),
    Defect(
        "Swin2SR's scale grows without end",
        f"{HERE}restoration.py",
        "self.logit_scale.clamp(max=MOST_LOG_SCALE)",
        "self.logit_scale",
        "test_models_spandrel.py::test_scales_of_cosines_end_where_theirs_do",
    ),
    Defect(
        "DAT's windows are all long",
        f"{HERE}spandrel_dat.py",
        "sizes[::-1] if i else sizes",
        "sizes",
        f"test_accelerated.py::{SAME}[spandrel DAT (16, 40)]",
    ),
    Defect(
        "OmniSR's grid is windows",
        f"{HERE}spandrel_omnisr.py",
        "local if i == WINDOWS else grid",
        "local",
        f"test_accelerated.py::{SAME}[spandrel OmniSR (16, 40)]",
    ),
    Defect(
        "Uformer's modulators are those of windows that are not shifted",
        f"{HERE}spandrel_uformer.py",
        " - axis.origin",
        "",
        f"test_accelerated.py::{SAME}[spandrel Uformer (32, 32)]",
    ),
    Defect(
        "zeros behind a map are one key, not as many as there are",
        f"{HERE}windows.py",
        "        extra_weight=missing_tokens(partition, x.device)[None, ..., None].to(x.dtype),  # [1, *size, 1]\n",
        "",
        f"test_accelerated.py::{SAME}[transformers SAM 2 (96, 160)]",
    ),
    Defect(
        "Hiera's units are as many as they have tokens",
        f"{HERE}transformers_hiera.py",
        "length // self.window_size",
        "self.window_size",
        f"test_accelerated.py::{SAME}[transformers Hiera (64, 96)]",
    ),
    Defect(
        "the bias around a triangle's ending node is not turned",
        f"{HERE}boltz.py",
        "bias if self.starting else bias.mT",
        "bias",
        f"test_accelerated.py::{SAME}[boltz triangle attention (7,)]",
    ),
    Defect(
        "residues that do not exist are attended",
        f"{HERE}boltz.py",
        "_with(k, mask_bias / scale)",
        "_with(k, mask_bias * 0)",
        f"test_accelerated.py::{SAME}[boltz triangle attention (7,)]",
    ),
    Defect(
        "Qwen's windows are as wide as they are high",
        f"{HERE}transformers_qwen.py",
        "(side, side * square)",
        "(side, side)",
        f"test_accelerated.py::{SAME}[transformers Qwen2.5-VL's vision (1, 16, 24)]",
    ),
    Defect(
        "Aurora's world has an edge",
        f"{HERE}aurora.py",
        "(False, False, warped)",
        "(False, False, False)",
        f"test_accelerated.py::{SAME}[aurora Swin3D (4, 12, 16)]",
    ),
    Defect(
        "Aurora's zeros are all behind the volume",
        f"{HERE}aurora.py",
        "-(n // 2) % w for n, w",
        "0 * n % w for n, w",
        f"test_accelerated.py::{SAME}[aurora layer (4, 7, 10)]",
    ),
)

APART = {"aurora": ("aurora", "pandas", "xarray"), "boltz": ("boltz",)}  # what their tests import, and may not find
MISSING = [f"{HERE}{name}.py" for name, imported in APART.items() if None in map(find_spec, imported)]
DEFECTS = tuple(defect for defect in ALL if defect.file not in MISSING)
