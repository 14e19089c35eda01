"""The table of sites: every part of the package reads it."""

from __future__ import annotations

from asi_lens.base.sites import SITES
from asi_lens.figures import style
from asi_lens.inputs import hooks


def test_sites_look_and_lie_apart() -> None:
    for fact in ("template", "label", "color", "marker"):
        assert len({getattr(site, fact) for site in SITES.values()}) == len(SITES)
    assert all(site.template.count("{}") == 1 for site in SITES.values())


def test_hooks_and_figures_read_the_table() -> None:
    assert tuple(SITES) == hooks.SITES
    for name, site in SITES.items():
        assert (style.label(name), style.color(name), style.marker(name)) == (
            site.label,
            site.color,
            site.marker,
        )
