"""Chat templates are programs that come with a model: they run in a sandbox."""

import json
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagewire.serve.model.config import ModelError


def compile_template(source: str, where: str) -> jinja2.Template:
    """The template in a sandbox: it is data of the model's author, not our code."""
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    # plain JSON: jinja2's own filter escapes for HTML
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"{where}: chat template: expected a jinja2 template, got {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
