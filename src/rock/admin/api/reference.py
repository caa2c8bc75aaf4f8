"""The pages `/docs` (Swagger UI) and `/redoc` (Redoc) of the API, without a request to another server.

The package fastapi-offline has the assets of both pages; nothing else of it is used. Its static folder is not mounted:
only the files in `_ASSETS` are served. Each page has a Content-Security-Policy that allows these files and the hash of
the page's own inline script, so that a text in the OpenAPI document cannot run as a script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

from rock.errors import NotFound

ASSETS = "/docs/assets/"
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css",
           "redoc.standalone.js": "text/javascript", "favicon.png": "image/png"}  # fmt: skip
_INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_CACHED = "public, max-age=86400"


def add_pages(app: FastAPI) -> None:
    """Add both pages and their assets."""
    folder = Path(str(files("fastapi_offline"))) / "static"
    title, schema, icon = f"{app.title} API", str(app.openapi_url), ASSETS + "favicon.png"
    swagger = get_swagger_ui_html(
        openapi_url=schema, title=title, swagger_favicon_url=icon, swagger_js_url=ASSETS + "swagger-ui-bundle.js",
        swagger_css_url=ASSETS + "swagger-ui.css",
    )  # fmt: skip
    redoc = get_redoc_html(openapi_url=schema, title=title, redoc_favicon_url=icon, with_google_fonts=False,
                           redoc_js_url=ASSETS + "redoc.standalone.js")  # fmt: skip
    for page in (swagger, redoc):
        page.headers["content-security-policy"] = _policy(bytes(page.body))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return swagger

    @app.get("/redoc", include_in_schema=False)
    async def redoc_page() -> HTMLResponse:
        return redoc

    @app.get(ASSETS + "{name}", include_in_schema=False)
    async def asset(name: str) -> FileResponse:
        if name not in _ASSETS:
            raise NotFound(f"there is no asset {name!r}", hint="open /docs or /redoc")
        return FileResponse(folder / name, media_type=_ASSETS[name], headers={"cache-control": _CACHED})


def _policy(page: bytes) -> str:
    """The policy of a page: its own server, and the hashes of its inline scripts."""
    hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _INLINE.findall(page))
    scripts = " ".join(["'self'", *(f"'sha256-{one}'" for one in hashes)])
    return (f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
            "connect-src 'self'; worker-src blob:; font-src data:; frame-ancestors 'none'; base-uri 'none'")
