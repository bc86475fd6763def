"""The page at /docs: the OpenAPI document as HTML, without scripts and without other hosts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from fastapi.responses import HTMLResponse

_STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 sans-serif; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #bbb; padding: .25rem .6rem; text-align: left; vertical-align: top; }
pre { overflow: auto; max-height: 20rem; padding: .6rem; border: 1px solid #bbb; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'"


def documentation_page(document: dict[str, Any]) -> HTMLResponse:
    """Return the page that describes the operations of an OpenAPI document."""
    info = document["info"]
    parts = [
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['summary'])}</p>"
        "<p>For programs: <a href='/openapi.json'>OpenAPI document</a></p>"
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(f"{method.upper()} {path}", operation)
    html = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(info['title'])}</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})


def _operation(name: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{escape(name)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    if "parameters" in operation:
        rows = ((x["name"], x["in"], _values(x["schema"]), x.get("description", "")) for x in operation["parameters"])
        yield "<h3>Parameters</h3>" + _table(("name", "in", "values", "description"), rows)
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        bodies = ((media_type, _members(x["schema"])) for media_type, x in content.items())
        yield "<h3>Body</h3>" + _table(("Content-Type", "members"), bodies)
    for media_type, x in content.items():
        if "example" in x:
            example = escape(json.dumps(x["example"], indent=2))
            yield f"<details><summary>Example of {escape(media_type)}</summary><pre>{example}</pre></details>"
    responses = ((status, x["description"], _media_types(x)) for status, x in operation["responses"].items())
    yield "<h3>Responses</h3>" + _table(("status", "meaning", "Content-Type"), responses)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _values(schema: dict[str, Any]) -> str:
    """Return the type of a parameter, or its possible values."""
    alternatives = [x for x in schema.get("anyOf", [schema]) if x.get("type") != "null"]
    default = f" (default: {json.dumps(schema['default'])})" if schema.get("default") is not None else ""
    return " or ".join(", ".join(x["enum"]) if "enum" in x else x.get("type", "") for x in alternatives) + default


def _members(schema: dict[str, Any]) -> str:
    return ", ".join(schema.get("properties", ())) or "the file's bytes"


def _media_types(response: dict[str, Any]) -> str:
    return ", ".join(response.get("content", ()))
