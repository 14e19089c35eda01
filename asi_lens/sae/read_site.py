"""Which site a dictionary is of, as its metadata say it: in the words of asi_lens, SAELens or sparsify."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from asi_lens.activations.harvest import SiteLayer, places
from asi_lens.base.errors import OptionError
from asi_lens.base.sites import SITES
from asi_lens.inputs import models

# sparsify names a folder after the module whose output it reads.
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(self_attn|attn|attention|mlp))?")


def site_read(model: nn.Module, about: Mapping[str, Any]) -> SiteLayer | None:
    """Return the (site, layer) that a dictionary's metadata name, None if they name none.

    `hook_attn_out` and `hook_mlp_out` mean in TransformerLens what is added to the stream, after a norm that
    follows; so do the short names. Raises OptionError for a head alone or a module whose output is no site,
    and as `places` does.
    """
    if about.get("hook_head_index") is not None:
        raise OptionError(f"it reads head {about['hook_head_index']} alone, and no site here is one head")
    if about.get("site") is not None and about.get("layer") is not None:
        return places(model, [str(about["site"])], [int(about["layer"])])[0]
    if about.get("hook_name"):
        hook = str(about["hook_name"])
        found = re.match(r"blocks\.(\d+)\.", hook)
        for short, site in SITES.items():
            if found and hook == site.template.format(found[1]):
                return places(model, [short], [int(found[1])])[0]
        return places(model, [hook], [0])[0]
    module = _MODULE.fullmatch(str(about.get("hf_hook_name", "")))
    if module is None:
        return None
    layer, part = int(module[1]), module[2]
    write = models.attention_write_site(model)
    if part == "mlp" and write != "attn_out":
        # Such models norm or scale the MLP's output, too: the module's output is not what is added.
        raise OptionError(f"it reads {about['hf_hook_name']!r}, which is no site of this model")
    site_name = {None: "resid_post", "mlp": "mlp_out"}.get(part, write)
    return places(model, [site_name], [layer])[0]
