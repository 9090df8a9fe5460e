"""How the course of episodes is shown: a table for the terminal, three figures, and a page of coloured texts."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from eval.course import Contrast, Course, Rising, aligned
from eval.report.drawing import ARM_COLOURS, BASE_COLOUR, INK, PAGE, TEMPLATES, Figure, Look, dots_svg, render, svg_of
from eval.report.story import number_text
from eval.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 24
"""Tokens on either side of the restart in the figure of one episode."""
EPISODES = 40
"""On the page of texts, and one by one in the overlay."""
WITH, WITHOUT = "with a restart", "without, at the same tokens"
COLOURS = {WITH: ARM_COLOURS[0], WITHOUT: BASE_COLOUR}


def course_table(
    means: Mapping[str, Estimate], pairs: Sequence[Contrast], rising: Sequence[Rising], counts: tuple[int, int]
) -> list[str]:
    """Lines for a terminal."""
    lines = [f"{counts[0]} replies with a restart, {counts[1]} without one at the same tokens; sum of the latents"]
    lines += [f"  {region:8} {number_text(estimate, 3)} (n {estimate.n})" for region, estimate in means.items()]
    for each in pairs:
        test = "" if each.p is None else f", Wilcoxon p {each.p:.2g}, rank-biserial {each.effect:+.2f}"
        lines.append(f"  {each.second} − {each.first}: {number_text(each.difference, 3)} (n {each.difference.n}{test})")
    lines.append(f"  {len(rising)} latents rise before restarts, or say so by their label:" if rising else "")
    for one in rising:
        name = f"{one.name} (by its label)" if one.by_label else one.name
        rises = f"{one.rise:+.3f} against {one.other:+.3f}"
        lines.append(f"  {one.latent:6} AUC {one.auc:.2f}, q {one.q:.1g}, {rises}: {name}")
    return [line for line in lines if line]


def course_figures(restarts: Sequence[Course], others: Sequence[Course], means: Mapping[str, Estimate]) -> list[Figure]:
    """One episode with its text, all of them aligned at the restart, and the regions' means."""
    return [_episode_figure(typical(restarts)), _overlay_figure(restarts, others), _region_figure(means)]


def typical(courses: Sequence[Course]) -> Course:
    """The episode with most tokens on both sides of its restart, up to those that are shown."""
    return max(courses, key=lambda each: (min(each.at, SHOWN) + min(len(each.values) - each.at, SHOWN), each.key))


def _episode_figure(course: Course) -> Figure:
    first, end = max(0, course.at - SHOWN), min(len(course.values), course.at + SHOWN)
    table = [("token", "text", "sum"), *((n, course.tokens[n], float(course.values[n])) for n in range(first, end))]

    def draw(axes: "Axes") -> None:
        axes.plot(range(first, end), course.values[first:end], color=ARM_COLOURS[0], lw=1.4, marker="o", ms=3)
        axes.axvline(course.at - 0.5, color=INK, lw=0.8)
        axes.set_xticks(
            range(first, end), [course.tokens[n].strip() for n in range(first, end)], rotation=90, fontsize=6
        )
        axes.set_ylabel("sum of the latents")
        axes.grid(axis="y")

    svg = partial(svg_of, draw, {}, 2.6)
    caption = "One reply, token by token; the line stands where it restarts."
    return Figure("episode", "One episode", caption, svg().decode(), list(table), svg)


def _overlay_figure(restarts: Sequence[Course], others: Sequence[Course]) -> Figure:
    lines = {name: aligned(courses) for name, courses in ((WITH, restarts), (WITHOUT, others))}
    table = [("replies", "offset", "value", "low", "high", "n")]
    table += [
        (name, offset, each.value, each.low, each.high, each.n)  # type: ignore[misc]
        for name, points in lines.items()
        for offset, each in points
    ]

    def draw(axes: "Axes") -> None:
        for each in restarts[:EPISODES]:
            first, end = max(0, each.at - SHOWN), min(len(each.values), each.at + SHOWN + 1)
            axes.plot(
                range(first - each.at, end - each.at), each.values[first:end], color=COLOURS[WITH], lw=0.4, alpha=0.2
            )
        for name, points in lines.items():
            sound = [(offset, e.value, e.low, e.high) for offset, e in points if e.low is not None]
            if sound:
                x, value, low, high = zip(*sound, strict=True)
                axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.25, lw=0)
                axes.plot(x, value, color=COLOURS[name], lw=1.8)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_xlabel("tokens from the restart")
        axes.set_ylabel("sum of the latents")

    svg = partial(svg_of, draw, COLOURS, 2.8)
    caption = "Replies that restart (40 at most), the mean of all, and that of replies that do not; 95 % intervals."
    return Figure("overlay", "Aligned at the restart", caption, svg().decode(), list(table), svg)


def _region_figure(means: Mapping[str, Estimate]) -> Figure:
    dots = [(region, WITH, estimate) for region, estimate in means.items()]
    table = [("region", "value", "low", "high", "n")]
    table += [(region, e.value, e.low, e.high, e.n) for region, e in means.items()]  # type: ignore[misc]

    def svg(look: Look = PAGE) -> bytes:
        return dots_svg({"sum of the latents": dots}, {WITH: COLOURS[WITH]}, look=look)

    caption = "Means over the tokens of each region, 95 % intervals clustered by direction."
    return Figure("regions", "Regions", caption, svg().decode(), list(table), svg)


def episodes_page(title: str, courses: Sequence[Course]) -> str:
    """A page of texts whose tokens are coloured by the sum of the latents; a bar stands where each restarts."""
    highest = max((float(each.values.max()) for each in courses), default=0.0) or 1.0
    episodes = [
        [
            (token, value, max(0.0, min(1.0, value / highest)), number == each.at)
            for number, (token, value) in enumerate(zip(each.tokens, each.values.tolist(), strict=True))
        ]
        for each in courses[:EPISODES]
    ]
    return render(TEMPLATES, "episodes.html", title=title, colours=(), episodes=episodes)
