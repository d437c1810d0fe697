"""Mistakes in networks of others, accelerated."""

from importlib.util import find_spec

from tests.mutations.defect import Defect

HERE = "isa_triton/models/accelerated/"
SAME = "test_is_the_same_function"

ALL = (
    Defect(
        "spandrel's windows are not shifted",
        f"{HERE}restoration.py",
        "local(extent, self.window_size, self.shift_size)",
        "local(extent, self.window_size)",
        f"test_models_spandrel.py::{SAME}[SwinIR (16, 16)]",
    ),
    Defect(
        "spandrel's bias of keys and queries",
        f"{HERE}restoration.py",
        "view(*index.shape, -1).permute(2, 0, 1)",
        "view(*index.shape, -1).permute(2, 1, 0)",
        f"test_models_spandrel.py::{SAME}[HAT (16, 16)]",
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
        f"test_models_spandrel.py::{SAME}[DAT (16, 40)]",
    ),
    Defect(
        "OmniSR's grid is windows",
        f"{HERE}spandrel_omnisr.py",
        "local if i == WINDOWS else grid",
        "local",
        f"test_models_spandrel.py::{SAME}[OmniSR (16, 40)]",
    ),
    Defect(
        "Uformer's modulators are those of windows that are not shifted",
        f"{HERE}spandrel_uformer.py",
        " - axis.origin",
        "",
        f"test_models_spandrel.py::{SAME}[Uformer (32, 32)]",
    ),
    Defect(
        "zeros behind a map are one key, not as many as there are",
        f"{HERE}windows.py",
        "        extra_weight=missing_tokens(partition, x.device)[None, ..., None].to(x.dtype),  # [1, *size, 1]\n",
        "",
        f"test_models_hiera.py::{SAME}[SAM 2 (96, 160)]",
    ),
    Defect(
        "Hiera's units are as many as they have tokens",
        f"{HERE}transformers_hiera.py",
        "length // self.window_size",
        "self.window_size",
        f"test_models_hiera.py::{SAME}[Hiera (64, 96)]",
    ),
    Defect(
        "the bias around a triangle's ending node is not turned",
        f"{HERE}boltz.py",
        "bias if self.starting else bias.mT",
        "bias",
        f"test_models_boltz.py::{SAME}[triangle attention (7,)]",
    ),
    Defect(
        "residues that do not exist are attended",
        f"{HERE}boltz.py",
        "_with(k, mask_bias / scale)",
        "_with(k, mask_bias * 0)",
        f"test_models_boltz.py::{SAME}[triangle attention (7,)]",
    ),
    Defect(
        "Qwen's windows are as wide as they are high",
        f"{HERE}transformers_qwen.py",
        "(window, window * square)",
        "(window, window)",
        f"test_models_qwen.py::{SAME}[Qwen2.5-VL's vision (1, 16, 24)]",
    ),
    Defect(
        "Aurora's world has an edge",
        f"{HERE}aurora.py",
        "(False, False, warped)",
        "(False, False, False)",
        f"test_models_aurora.py::{SAME}[Swin3D (4, 12, 16)]",
    ),
    Defect(
        "Aurora's zeros are all behind the volume",
        f"{HERE}aurora.py",
        "-(n // 2) % w for n, w",
        "0 * n % w for n, w",
        f"test_models_aurora.py::{SAME}[layer (4, 7, 10)]",
    ),
)

APART = {"aurora": ("aurora", "pandas", "xarray"), "boltz": ("boltz",)}  # what their tests import, and may not find
MISSING = [f"{HERE}{name}.py" for name, imported in APART.items() if None in map(find_spec, imported)]
DEFECTS = tuple(defect for defect in ALL if defect.file not in MISSING)
