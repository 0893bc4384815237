"""Chat templates are programs that come with a model: they run in a sandbox."""

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from pagewire.serve.model.config import ModelError


def compile_template(source: str, where: str) -> jinja2.Template:
    """The template in a sandbox: it is data of the model's author, not our code."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ModelError(f"{where}: chat template: expected a jinja2 template, got {error}") from error


def _tojson(value: Any, indent: int | None = None) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
