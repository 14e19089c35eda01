"""One builder per figure of the notebooks beyond the paper: a table in, a plotly figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import curve, in_lines, panels
from asi_lens.figures.style import (
    GREY,
    METHODS,
    color,
    label,
    marker,
    methods,
    need,
    order,
    over,
    setting,
    sites,
)
from asi_lens.results.beyond_rows import DiagnosisRow, InputRow, LifeRow, SavedFeatureRow, StartRow

_FATES = {
    "never fired": ("never_fired", "#444444"),
    "fired, then died": ("died", "#c0392b"),
    "came back": ("came_back", "#56B4E9"),
}


def death_at_start(table: pd.DataFrame) -> go.Figure:
    """Draw features that never fire at a random start against gamma (raw) and against rank (centered).

    Takes `StartRow`s; means over seeds, a mark per layer. The line on the left is the prediction of arXiv
    2605.31518 from gamma alone.
    """
    need(table, StartRow)
    keys = ["site", "layer", "input"]
    means = (
        table.groupby(keys)[["gamma", "effective_rank_fraction", "predicted", "dead"]].mean().reset_index()
    )
    names = ["raw inputs", "mean subtracted"]
    figure = panels("Features that never fire at a random start", setting(table), [names], y="never fire (%)")
    shown = ((1, "raw", "gamma", "gamma = |mean| / |σ|"), (2, "mean", "effective_rank_fraction", ""))
    for col, name, x, title in shown:
        part = means[means.input == name]
        if col == 1:
            line = part.sort_values("gamma")
            figure.add_scatter(
                x=line.gamma,
                y=100 * line.predicted,
                mode="lines",
                line={"color": GREY, "dash": "dot"},
                name="predicted from gamma",
                row=1,
                col=1,
            )
        for site in sites(part):
            own = part[part.site == site]
            figure.add_scatter(
                x=own[x],
                y=100 * own.dead,
                mode="markers",
                name=label(site),
                legendgroup=site,
                showlegend=col == 1,
                marker={"symbol": marker(site), "size": 8, "color": color(site)},
                customdata=own.layer,
                hovertemplate=f"{label(site)} %{{customdata}}<br>%{{x:.3f}}: %{{y:.2f}} %<extra></extra>",
                row=1,
                col=col,
            )
        figure.update_xaxes(title_text=title or "effective rank / width", row=1, col=col)
    return figure


def inputs_and_starts(table: pd.DataFrame) -> go.Figure:
    """Draw silent features and FVU on held-out text by treatment of the inputs, a line per start.

    Takes `InputRow`s. A column of panels per (site, layer); lines are means over seeds, bands their range.
    """
    need(table, InputRow)
    held = table[table.split == "held_out"].assign(silent=100 * table.dead_fraction)
    places = list(dict.fromkeys(zip(held.site, held.layer, strict=True)))
    titles = [f"{label(site)}, layer {layer}" for site, layer in places]
    figure = panels(
        "Centering, whitening, and the start",
        setting(held, tokens=False),
        [titles, [""] * len(titles)],
        shared_y=False,
        bottom=110,
    )
    names = order(held, "input")
    for col, (site, layer) in enumerate(places, start=1):
        here = held[(held.site == site) & (held.layer == layer)]
        here = here.assign(x=here.input.map(names.index))
        for row, column in ((1, "silent"), (2, "fvu")):
            for start in order(here, "start"):
                line = here[here.start == start]
                curve(figure, line, "x", column, start, row, col, look=METHODS.get(start))
    # Both rows have the same treatments: the lower row names them.
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, tickangle=-38)
    figure.update_xaxes(showticklabels=False, row=1)
    figure.update_yaxes(title_text="silent features,<br>held out (%)", row=1, col=1)
    figure.update_yaxes(title_text="fraction of variance<br>unexplained", row=2, col=1)
    return figure


def diagnosis(table: pd.DataFrame) -> go.Figure:
    """Draw effective rank, gamma, and features that never fire at a random start, over layers.

    Takes `DiagnosisRow`s of one model. In the last panel solid lines are raw inputs, dashed lines centered.
    """
    need(table, DiagnosisRow)
    shares = table.assign(raw=100 * table.dead_raw, centered=100 * table.dead_centered)
    shown = [
        ("effective rank / width", "effective_rank_fraction"),
        ("gamma = |mean| / |σ|", "gamma"),
        ("never fire at a<br>random start (%)", "raw"),
    ]
    titles = ["rank", "mean", "death at the start (dashed: centered)"]
    figure = panels("Before a dictionary is trained", setting(table), [titles], shared_y=False)
    for col, (title, column) in enumerate(shown, start=1):
        for site in sites(shares):
            part = shares[shares.site == site]
            curve(figure, part, "layer", column, site, 1, col)
            if column == "raw":
                curve(figure, part, "layer", "centered", site, 1, col, dash="dash")
        figure.update_yaxes(title_text=title, rangemode="tozero", row=1, col=col)
    figure.update_xaxes(title_text="layer")
    return figure


def saved_features(table: pd.DataFrame) -> go.Figure:
    """Draw what features mean against how often they fire: saved by ASI, and as frequent ones.

    Takes `SavedFeatureRow`s. Left: bits that a firing tells about the token, more than a random draw as large
    would. Right: next-token loss without the feature, per firing.
    """
    need(table, SavedFeatureRow)
    titles = ["about the token", "about the next token"]
    figure = panels("Features that ASI saves", setting(table, tokens=False), [titles], shared_y=False)
    groups = {"alive either way": METHODS["random"], "saved by ASI": METHODS["ASI"]}
    for group, (paint, symbol) in groups.items():
        own = table[table.group == group]
        for col, column in ((1, "information"), (2, "loss_increase")):
            figure.add_scatter(
                x=own.firings,
                y=own[column],
                mode="markers",
                name=group,
                legendgroup=group,
                showlegend=col == 1,
                marker={"symbol": symbol, "size": 7, "color": paint, "opacity": 0.75},
                customdata=own[["feature", "seed"]],
                hovertemplate=f"{group}, feature %{{customdata[0]}}, seed %{{customdata[1]}}<br>"
                "%{x} firings: %{y:.3f}<extra></extra>",
                row=1,
                col=col,
            )
    for col, title in ((1, "information (bits)"), (2, "loss without it (nats per firing)")):
        figure.update_xaxes(type="log", title_text="firings on held-out text", row=1, col=col)
        figure.update_yaxes(title_text=title, zeroline=True, row=1, col=col)
    return figure


def lives(table: pd.DataFrame) -> go.Figure:
    """Draw when features die: survival by method and by where rows began, and fates at the end.

    Takes `LifeRow`s. Survival is the share of features that fires after each row. It ends one window before
    the end of the run, since rare features are not told from dead features in the last window. The middle
    panel has the tenths of the first method with tenths, from blue (least in the tail) to red (most).
    """
    need(table, LifeRow)
    shares = table.assign(later=100 * table.fires_later)
    told = shares[shares.tokens <= shares.n_tokens - shares.dead_window_tokens]
    whole, split = told[told.tenth.isna()], told[told.tenth.notna()]
    first = split[split.method == split.method.iloc[0]] if len(split) else split
    window = int(table.dead_window_tokens.max())
    titles = [
        "by start and optimizer",
        "" if first.empty else f"{order(first, 'method')[0]}, in tenths (red: most tail)",
    ]
    figure = panels(
        "When do features die?",
        setting(table, what=" · ".join(filter(None, [f"dead: {window:,} tokens", over(table, "seed")]))),
        [[*titles, "at the end"]],
        shared_y=False,
    )
    for method, look in methods(whole).items():
        own = whole[whole.method == method]
        curve(figure, own, "tokens", "later", method, 1, 1, look=look, markers=False)
    means = first.groupby(["tenth", "tokens"]).later.mean()
    n = max(1.0, float(first.tenth.max())) if len(first) else 1.0
    for tenth in means.index.unique("tenth"):
        line, share = means[tenth], (tenth - 1) / max(1.0, n - 1)
        tone = f"rgb({round(40 + 200 * share)},{round(120 - 60 * share)},{round(200 - 160 * share)})"
        figure.add_scatter(
            x=line.index,
            y=line,
            mode="lines",
            name=f"tenth {tenth:g}",
            showlegend=False,
            line={"color": tone, "width": 1.8},
            hovertemplate=f"tenth {tenth:g}<br>%{{x}}: %{{y:.2f}}<extra></extra>",
            row=1,
            col=2,
        )
    ends = table[table.tenth.isna() & (table.tokens == table.n_tokens)]
    for name, (column, tone) in _FATES.items():
        # A feature that never fired is dead: the two lower parts of a bar are the dead.
        values = 100 * ends.groupby("method", sort=False)[column].mean()
        figure.add_bar(
            x=[in_lines(method, among=9) for method in values.index],
            y=values,
            name=name,
            marker={"color": tone},
            hovertemplate=f"{name}: %{{y:.2f}} %<extra></extra>",
            row=1,
            col=3,
        )
    figure.update_layout(barmode="stack")
    room = max(1.0, 100 - told.later.min())
    for col in (1, 2):
        figure.update_xaxes(title_text="training tokens", tickformat="~s", row=1, col=col)
        figure.update_yaxes(title_text="features that still fire later (%)", row=1, col=col)
        figure.update_yaxes(range=[100 - 1.06 * room, 100 + 0.06 * room], row=1, col=col)
    figure.update_xaxes(tickangle=0, row=1, col=3)
    figure.update_yaxes(title_text="features (%)", rangemode="tozero", row=1, col=3)
    return figure
