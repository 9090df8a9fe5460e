"""Pages from templates: text in them is escaped, and every page includes the same `style.css`."""

from typing import Any

HERE = "eval.report"


def render(package: str, name: str, **values: Any) -> str:
    """A page.

    Args:
        package: where the template lies; what it includes may lie there or here.
        name: of the template.
        values: of its variables; one that the template asks for and that is not given is an error.
            `style.css` asks for `colours`: those that `drawing.inline_svg` was given, each once, in order.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(each, "") for each in dict.fromkeys((package, HERE))]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name).render(**values)
