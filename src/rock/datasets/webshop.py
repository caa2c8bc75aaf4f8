"""WebShop: find a product in a shop of text pages, choose its options and buy it.

The actions are WebShop's own, search[words] and click[what is on the page], and so is the reward: the share of wanted
attributes and options that the bought product has, and whether it is cheap enough, less where it is another kind of
thing. Without data there is a small shop that is generated, always the same one. With data it is WebShop's: a folder
with items_shuffle.json or items_shuffle_1000.json, and items_ins_v2.json or items_human_ins.json.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rock.guest.environments.tasks import (
    DATA,
    BadAction,
    BadParams,
    Message,
    MissingData,
    Outcome,
    Task,
    UnknownTask,
    says,
    text_of,
)

_ACTION = re.compile(r"\b(search|click)\[([^\[\]]{1,300})\]", re.I)
_WORD = re.compile(r"[a-z0-9]+")
_PRICE = re.compile(r"\d+(?:\.\d+)?")
_PAGE = 10
_MOST_STEPS = 50
_TEST = 0.1  # share of goals that are the test split
_SYSTEM = """You shop in a web shop. Every answer is one action:
search[words]    on the search page
click[text]      on something in brackets on the page: a product, an option, Next, Buy Now, ...
Buy exactly one product that fits what the user asks for, with the right options."""


@dataclass
class Product:
    """What is sold. options: values to choose from, by name. kind: what sort of thing it is."""

    id: str
    title: str
    price: float
    kind: str = ""
    attributes: list[str] = field(default_factory=list)
    options: dict[str, list[str]] = field(default_factory=dict)
    description: str = ""
    words: Counter[str] = field(default_factory=Counter)


@dataclass
class Goal:
    """What a user wants. `most`: the highest price."""

    product: str
    instruction: str
    attributes: list[str]
    options: dict[str, str]
    most: float


class WebShop(Task):
    """One purchase. params: nothing."""

    SPLITS = ("train", "test")
    products: ClassVar[dict[str, Product]] = {}
    goals: ClassVar[list[Goal]] = []
    rarity: ClassVar[dict[str, float]] = {}

    @classmethod
    def prepare(cls) -> None:
        products, cls.goals = _read(DATA) if os.path.isdir(DATA) else _generated()
        seen: Counter[str] = Counter()
        for product in products:
            text = " ".join([product.title, product.kind, product.description, *product.attributes])
            product.words = Counter(_words(text))
            seen.update(product.words.keys())
        cls.products = {product.id: product for product in products}
        cls.rarity = {word: math.log(1 + len(products) / count) for word, count in seen.items()}

    @classmethod
    def tasks(cls, split: str, params: dict[str, Any]) -> list[str]:
        first = math.ceil(len(cls.goals) * (1 - _TEST))
        return [f"goal-{n}" for n in (range(first) if split == "train" else range(first, len(cls.goals)))]

    def __init__(self, task_id: str, params: dict[str, Any]) -> None:
        super().__init__(task_id, params)
        number = task_id.removeprefix("goal-")
        if not number.isascii() or not number.isdigit() or int(number) >= len(self.goals):
            raise UnknownTask(f"the shop has no task {task_id!r}; they are goal-0 to goal-{len(self.goals) - 1}")
        self.goal = self.goals[int(number)]
        self.steps = 0
        self.found: list[str] = []  # ids of the last search
        self.page = 0
        self.query = ""
        self.item: Product | None = None
        self.chosen: dict[str, str] = {}
        self.bought: float | None = None

    # ---- what is asked

    def start(self) -> list[Message]:
        return [says(_SYSTEM, "system"), says(f"{self.goal.instruction}\n\n{self._shown()}")]

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> Outcome:
        self.steps += 1
        late = self.steps >= _MOST_STEPS
        wanted = _ACTION.findall(text_of(action))
        if not wanted and not late:
            raise BadAction("no action: answer with search[words] or click[text]")
        if wanted:
            verb, what = wanted[-1][0].lower(), wanted[-1][1].strip()
            if verb == "search":
                self._search(what)
            else:
                self._click(what)
        if self.bought is not None:
            return Outcome([], self.bought, terminated=True, info={"stop_reason": "bought"})
        if late:
            return Outcome([says(self._shown())], 0.0, truncated=True, info={"stop_reason": "step_limit"})
        return Outcome([says(self._shown())])

    def evaluate(self, messages: list[Message] | None, params: dict[str, Any]) -> float:
        if messages:
            raise BadParams("the shop judges what was bought, not messages")
        return self.bought or 0.0

    def tools(self, messages: list[Message] | None, params: dict[str, Any]) -> Any:
        return {"search": self.item is None and not self.found, "click": self._links()}

    def solution(self) -> list[Message]:
        product = self.products[self.goal.product]
        steps = [f"search[{product.id}]", f"click[{product.id}]"]
        steps += [f"click[{value}]" for value in self.goal.options.values()]
        return [{"role": "assistant", "content": step} for step in (*steps, "click[Buy Now]")]

    # ---- pages

    def _links(self) -> list[str]:
        """What can be clicked on this page."""
        if self.item is not None:
            values = [value for several in self.item.options.values() for value in several]
            return [*values, "Buy Now", "Prev", "Back to Search"]
        if not self.query:
            return []
        more = ["Next"] if (self.page + 1) * _PAGE < len(self.found) else []
        before = ["Prev"] if self.page else []
        return [*self._listed(), *before, *more, "Back to Search"]

    def _listed(self) -> list[str]:
        return self.found[self.page * _PAGE : (self.page + 1) * _PAGE]

    def _shown(self) -> str:
        links = " ".join(f"[{link}]" for link in self._links())
        if self.item is not None:
            item = self.item
            traits = [f"- {text}" for text in item.attributes]
            lines = [item.title, f"Price: ${item.price:.2f}", item.description, *traits]
            for name, values in item.options.items():
                lines.append(f"{name}: {' '.join(f'[{value}]' for value in values)}")
            chosen = ", ".join(f"{name}: {value}" for name, value in self.chosen.items())
            lines += [f"Chosen: {chosen or 'nothing'}", "[Buy Now] [Prev] [Back to Search]"]
            return "\n".join(filter(None, lines))
        if not self.query:
            return "Search page: search[words]"
        lines = [f"[{id}] {self.products[id].title} ${self.products[id].price:.2f}" for id in self._listed()]
        pages = max(1, math.ceil(len(self.found) / _PAGE))
        return "\n".join([f"Page {self.page + 1} of {pages} for: {self.query}", *lines, links])

    def _search(self, query: str) -> None:
        if self.item is not None or self.query:
            raise BadAction("search is on the search page: click[Back to Search] first")
        self.query, self.page = query, 0
        words = _words(query)
        scores = {
            product.id: sum(self.rarity.get(word, 0.0) for word in words if word in product.words)
            + (100.0 if product.id.lower() == query.lower() else 0.0)
            for product in self.products.values()
        }
        self.found = sorted((id for id, score in scores.items() if score > 0), key=lambda id: (-scores[id], id))[:50]

    def _click(self, what: str) -> None:
        link = next((link for link in self._links() if link.lower() == what.lower()), None)
        if link is None:
            raise BadAction(f"there is no [{what}] on this page")
        if link == "Back to Search":
            self.item, self.query, self.found, self.page = None, "", [], 0
        elif self.item is None and link in ("Next", "Prev"):
            self.page += 1 if link == "Next" else -1
        elif self.item is None:
            self.item, self.chosen = self.products[link], {}
        elif link == "Prev":
            self.item = None
        elif link == "Buy Now":
            self.bought = self._reward(self.item)
        else:
            name = next(name for name, values in self.item.options.items() if link in values)
            self.chosen[name] = link

    def _reward(self, item: Product) -> float:
        """1.0 for what was wanted; less for each thing that is missing, and for another kind of product."""
        goal, wanted = self.goal, self.products[self.goal.product]
        text = " ".join([item.title, item.description, *item.attributes]).lower()
        attributes = sum(attribute.lower() in text for attribute in goal.attributes)
        options = sum(self.chosen.get(name) == value for name, value in goal.options.items())
        total = len(goal.attributes) + len(goal.options) + 1
        share = (attributes + options + (item.price <= goal.most)) / total
        if item.id == wanted.id or item.kind == wanted.kind:
            return share
        same = set(_words(item.title)) & set(_words(wanted.title))
        return share * (0.5 if len(same) > 1 else 0.1 if same else 0.0)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


# ---- the shop that is generated


_KINDS = ("shirt", "lamp", "backpack", "kettle", "pillow", "notebook", "headphones", "jacket", "rug", "bottle")
_MAKERS = ("Alder", "Birch", "Cedar", "Fir", "Hazel", "Juniper", "Larch", "Maple", "Rowan", "Spruce")
_TRAITS = ("machine washable", "water resistant", "light weight", "hand made", "easy to clean", "long lasting",
           "eco friendly", "quick drying", "stain resistant", "travel size", "non slip", "noise free")  # fmt: skip
_COLORS = ("black", "blue", "green", "grey", "red", "white")
_SIZES = ("small", "medium", "large")


def _generated() -> tuple[list[Product], list[Goal]]:
    """200 products and a goal for each, from one seed."""
    dice = random.Random(7)
    products, goals = [], []
    for number in range(200):
        kind, traits = _KINDS[number % len(_KINDS)], dice.sample(_TRAITS, 4)
        options = {"color": dice.sample(_COLORS, 3), "size": list(_SIZES)}
        price = dice.randrange(500, 9000) / 100
        title = f"{dice.choice(_MAKERS)} {traits[0]} {kind} {number}"
        about = f"A {kind} that is {traits[1]} and {traits[2]}."
        product = Product(f"P{number:04}", title, price, kind, traits, options, about)
        wanted = {name: dice.choice(values) for name, values in options.items()}
        most = math.ceil(price / 10) * 10.0
        spec = f"I want a {traits[0]}, {traits[1]} {kind} in {wanted['color']}, size {wanted['size']}"
        text = f"{spec}, for no more than {most:.2f} dollars."
        goals.append(Goal(product.id, text, traits[:2], wanted, most))
        products.append(product)
    return products, goals


# ---- WebShop's own files


def _read(folder: str) -> tuple[list[Product], list[Goal]]:
    items = _first(folder, "items_shuffle.json", "items_shuffle_1000.json")
    told = _first(folder, "items_human_ins.json", "items_ins_v2.json")
    products = {product.id: product for product in map(_product, items)}
    goals = []
    for id in sorted(told.keys() & products.keys()):
        several = told[id] if isinstance(told[id], list) else [told[id]]
        goals += [goal for spec in several if (goal := _goal(products[id], spec)) is not None]
    if not goals:
        raise MissingData(f"no instruction in {folder} is about a product there")
    return list(products.values()), goals


def _first(folder: str, *names: str) -> Any:
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                return json.load(file)
    raise MissingData(f"the data folder has none of {', '.join(names)}: pass the folder with WebShop's as data=")


def _product(item: dict[str, Any]) -> Product:
    found = [float(number) for number in _PRICE.findall(str(item.get("pricing", "")).replace(",", ""))]
    options = {
        str(name).lower(): [str(value.get("value", "")).strip().lower() for value in values]
        for name, values in (item.get("customization_options") or {}).items()
        if values
    }
    points = [str(point) for point in item.get("small_description") or []]
    return Product(str(item["asin"]), str(item.get("name", "")), found[0] if found else 100.0,
                   str(item.get("product_category") or item.get("category") or ""), points, options,
                   str(item.get("full_description") or ""))  # fmt: skip


def _goal(product: Product, spec: dict[str, Any]) -> Goal | None:
    """None where the instruction was left out, as WebShop's files have it."""
    instruction = str(spec.get("instruction") or "")
    attributes = [str(text) for text in spec.get("instruction_attributes") or []]
    if not instruction or not attributes:
        return None
    product.attributes += [text for text in spec.get("attributes") or attributes if text not in product.attributes]
    given = spec.get("instruction_options") or []
    values = given.values() if isinstance(given, dict) else given
    wanted = {}
    for value in map(str, values):
        name = next((name for name, several in product.options.items() if value.lower() in several), None)
        if name is not None:
            wanted[name] = value.lower()
    most = math.ceil(product.price / 10 + 0.01) * 10.0
    text = f"{instruction.rstrip('. ')}, and price lower than {most:.2f} dollars"
    return Goal(product.id, text, attributes, wanted, most)
