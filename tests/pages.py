"""A page of the report, as a test reads it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path


class Parsed(HTMLParser):
    """A page as a browser reads it: its visible text, tags, and blocks of JSON."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.tags, self.json, self.inside = [], [], [], []
        self.addresses, self.ids = [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "link", "br"):
            self.inside.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.inside[-1] if self.inside else ("", {})
        if tag == "script":
            if attributes.get("type") == "application/json":
                self.json.append(json.loads(data))
        elif tag != "style":
            self.texts.append(data)
