"""Faults of a built site: links that lead nowhere, pictures without a file or a text in their place, loads from other servers, pages that are too large."""
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGEST = 1_500_000  # bytes of a page with its pictures


class Page(HTMLParser):
    "What a page points at: its anchors, links, loads, and pictures"

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads, self.pictures = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag == "link" and attrs.get("rel") not in ("canonical",): self.loads.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source", "video") and attrs.get("src"): self.loads.append(attrs["src"])
        if tag == "img": self.pictures.append((attrs.get("src", ""), attrs.get("alt")))


def weight(path: Path, page: Page) -> int:
    "Bytes of a page and its pictures, without the styles and scripts that all pages share"
    own = {(path.parent / unquote(src)).resolve() for src, _ in page.pictures if not urlsplit(src).scheme}
    return path.stat().st_size + sum(p.stat().st_size for p in own if p.exists())


def faults(site: Path) -> list[str]:  # one sentence each
    "Everything that is wrong with a built site"
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    found = [] if pages else [f"{site} holds no page."]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for url in [*page.links, *page.loads]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.loads and parts.scheme != "data": found.append(f"{name} loads {url} from another server.")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target /= "index.html"
            if not target.exists(): found.append(f"{name} points at {url}, which is not there.")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors | {"top"}:
                found.append(f"{name} points at {url}, and that page has no such place.")
        found += [f"{name} shows {src} without a text in its place." for src, alt in page.pictures if not alt]
        if weight(path, page) > LARGEST: found.append(f"{name} weighs {weight(path, page) / 1e6:.1f} MB with its pictures, and {LARGEST / 1e6} would be right.")
    for path in site.rglob("*.css"):
        for url in re.findall(r"url\([\"']?(https?:[^)\"']+)|@import\s+[\"'](https?:[^\"']+)", path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(site)} loads {''.join(url)} from another server.")
    return found


def report(site: Path) -> str:
    "Number of pages, size of the site, and its heaviest page"
    weights = {p.name: weight(p, Page(p.read_text(encoding="utf-8"))) for p in site.rglob("*.html")}
    heaviest = max(weights, key=weights.get)
    total = sum(p.stat().st_size for p in site.rglob("*") if p.is_file())
    return f"{len(weights)} pages, {total / 1e6:.1f} MB in all; the heaviest is {heaviest} with {weights[heaviest] / 1e6:.2f} MB."
