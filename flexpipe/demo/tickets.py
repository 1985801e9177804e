"""Synthetic support tickets and the answers a correct engine gives.

A ticket is free text (order number, product, complaint, urgency, small talk) that ends with the cue
`answer:`; the answer is compact JSON with category, priority and order id. This module decides what
tickets look like and which answer is right; it leaves learning them to `flexpipe.demo.train`.

The complaint decides the category and an urgency phrase the priority ("normal" without one). The
order id must be copied digit by digit, among other numbers that are not it. Single words (products,
names, "cracked") are shared by both splits, so that held-out sentences can be understood at all.
Invariants: the same split and seed give the same tickets; no sentence template and no id range of
the held-out split occurs in training.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal, get_args

Split = Literal["train", "held-out"]
Templates = Mapping[Split, Sequence[str]]

CUE = "\nanswer:"
CATEGORIES = (
    "damaged_item",
    "wrong_item",
    "late_delivery",
    "missing_part",
    "refund",
    "billing",
    "account",
    "cancellation",
    "question",
)
PRIORITIES = ("urgent", "high", "normal", "low")

# Numbers whose two leading digits are here are held out: per length, eighteen ranges of numbers
# such as 13000-13999. Each digit leads both kinds, so that no digit is new in its place.
HELD_OUT_LEADS = frozenset((13, 18, 24, 27, 31, 39, 40, 46, 52, 58, 65, 69, 72, 77, 81, 86, 90, 95))
ID_DIGITS = (4, 5, 6, 7)
ID_PREFIXES = ("", "#", "ORD", "ORD-", "SO-", "PO", "EU-", "US-", "WEB-", "WEB", "NL/", "SHOP-")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
SHARE_WITHOUT_ID = 0.1


@dataclass(frozen=True, slots=True)
class Ticket:
    """One ticket: `answer` is the wanted continuation of `prompt`, up to the end of sequence."""

    id: str
    prompt: str
    answer: str


def tickets(split: Split, num: int, seed: int) -> Iterator[Ticket]:
    """The first `num` tickets of a split; the same arguments always give the same tickets."""
    return islice(ticket_stream(split, seed), num)


def ticket_stream(split: Split, seed: int) -> Iterator[Ticket]:
    """Tickets without end."""
    rng = random.Random(f"flexpipe tickets {split} {seed}")
    index = 0
    while True:
        yield _ticket(f"{split}-{seed}-{index:05d}", split, rng)
        index += 1


def is_held_out_number(number: int) -> bool:
    """Whether an order number lies in a range that training never sees."""
    return int(str(number)[:2]) in HELD_OUT_LEADS


def all_templates(split: Split) -> frozenset[str]:
    """Every sentence template and layout that a split draws from."""
    banks = (*COMPLAINTS.values(), *URGENCY.values(), ORDER, NO_ORDER, SMALL_TALK)
    frames = (LEADS, GREETINGS, SIGN_OFFS, HEADERS)
    return frozenset(template for bank in (*banks, *frames) for template in bank[split])


class Scene(dict[str, str]):
    """The words of one ticket: each slot is drawn when first asked for and then stays.

    `{product2}` is a product other than `{product}`: a ticket may name several that must differ.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def __missing__(self, slot: str) -> str:
        kind = slot.rstrip("234")
        if kind == "any":  # salad: another word at each place
            return self._rng.choice(WORDS[kind])
        if kind in NUMBERS:
            self[slot] = NUMBERS[kind](self._rng)
        else:
            taken = [self.get(f"{kind}{suffix}") for suffix in ("", 2, 3, 4)]
            self[slot] = self._rng.choice([word for word in WORDS[kind] if word not in taken])
        return self[slot]


def order_id(split: Split, rng: random.Random) -> str:
    """An id such as A-10442 or ORD55812, its number from the ranges of the split."""
    if rng.random() < 0.4:
        prefix = rng.choice(LETTERS) + rng.choice(("", "-"))
    else:
        prefix = rng.choice(ID_PREFIXES)
    return f"{prefix}{_order_number(split, rng)}"


def _order_number(split: Split, rng: random.Random) -> int:
    num_digits = rng.choice(ID_DIGITS)
    while True:
        number = rng.randrange(10 ** (num_digits - 1), 10**num_digits)
        if is_held_out_number(number) == (split == "held-out"):
            return number


def _ticket(name: str, split: Split, rng: random.Random) -> Ticket:
    category, priority = rng.choice(CATEGORIES), rng.choice(PRIORITIES)
    order = None if rng.random() < SHARE_WITHOUT_ID else order_id(split, rng)
    scene = Scene(rng)
    scene["order"] = order or ""
    text = _text(split, category, priority, order, rng).format_map(scene)
    return Ticket(name, text + CUE, answer_text(category, priority, order))


def answer_text(category: str, priority: str, order: str | None) -> str:
    """The wanted answer as compact JSON, keys always in this order."""
    fields = {"category": category, "priority": priority, "order_id": order}
    return json.dumps(fields, separators=(",", ":"))


def _text(split: Split, category: str, priority: str, order: str | None, rng: random.Random) -> str:
    """A ticket with its slots still open."""
    sentences = _sentences(split, category, priority, order, rng)
    if rng.random() < 0.75:  # the others write without capitals
        sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    body = " ".join(_ended(sentence, rng) for sentence in sentences)
    return "".join(
        (
            _maybe(0.4, HEADERS[split], rng, after="\n"),
            _maybe(0.5, GREETINGS[split], rng, after=rng.choice((" ", "\n"))),
            body,
            _maybe(0.4, SIGN_OFFS[split], rng, before=rng.choice((" ", "\n"))),
        )
    )


def _sentences(
    split: Split, category: str, priority: str, order: str | None, rng: random.Random
) -> list[str]:
    """What the ticket says, in random order; long tickets complain twice."""
    num_complaints = 2 if rng.random() < 0.3 else 1
    complaints = rng.sample(COMPLAINTS[category][split], num_complaints)
    sentences = [_maybe(0.3, LEADS[split], rng, after=" ") + said for said in complaints]
    sentences += rng.sample(SMALL_TALK[split], rng.choice((0, 0, 1, 1, 2, 3, 4, 8)))
    if priority != "normal":
        sentences.append(rng.choice(URGENCY[priority][split]))
    if order is not None:
        sentences.append(rng.choice(ORDER[split]))
    elif rng.random() < 0.5:
        sentences.append(rng.choice(NO_ORDER[split]))
    rng.shuffle(sentences)
    return sentences


def _ended(sentence: str, rng: random.Random) -> str:
    if sentence[-1] in "?!":
        return sentence
    return sentence + rng.choice((".", ".", ".", "!", " -", "..."))


def _maybe(
    share: float, bank: Sequence[str], rng: random.Random, before: str = "", after: str = ""
) -> str:
    return f"{before}{rng.choice(bank)}{after}" if rng.random() < share else ""


def _digits(num_digits: int) -> Callable[[random.Random], str]:
    return lambda rng: str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))


# Slots that are numbers: none of them is the order id.
NUMBERS: Mapping[str, Callable[[random.Random], str]] = {
    "count": lambda rng: str(rng.randrange(2, 30)),
    "year": lambda rng: str(rng.randrange(2012, 2026)),
    "amount": lambda rng: f"{rng.randrange(5, 400)}.{rng.randrange(100):02d}",
    "phone": lambda rng: f"0{rng.randrange(20, 99)} {rng.randrange(100000, 999999)}",
    "model": lambda rng: f"{rng.choice(LETTERS)}{rng.choice(LETTERS)}{rng.randrange(10, 999)}",
    "customer": _digits(6),
    "postcode": _digits(5),
}

# Words that any split may use. Templates made of `{any}` word salad occur in training only: there
# nothing but the cue tells, so that cues are understood in sentences never seen.
WORDS: Mapping[str, Sequence[str]] = {
    "any": (
        *("the", "of", "and", "to", "see", "is", "was", "that", "this", "with", "for", "from"),
        *("you", "we", "our", "has", "just", "here", "about", "after", "before", "then", "also"),
        *("very", "please", "still", "some", "more", "all", "but", "if", "when", "while", "which"),
        *("who", "what", "where", "how", "there", "they", "it", "at", "on", "in", "by", "as", "do"),
        *("did", "can", "could", "would", "will", "me", "my", "your", "one", "look", "say", "I"),
        *("think", "know", "go", "give", "find", "keep", "show", "tell", "use", "write", "writing"),
        *("wrote", "talk", "ask", "number", "thing", "people", "home", "house", "phone", "card"),
        *("letter", "photo", "paper", "shop", "store", "team", "answer", "solve", "expect", "need"),
        *("since", "because", "already", "again", "once", "today's", "last", "first", "next"),
        *("yesterday", "week", "year", "gift", "good", "great", "nice", "small", "big", "old"),
        *("new", "sure", "surely", "busy", "far", "near", "way", "like", "receipt", "placed"),
        *("concerned", "mine", "yours", "sorry", "lost", "email", "hand", "weather", "review"),
    ),
    "product": (
        *("coffee grinder", "desk lamp", "rain jacket", "water bottle", "backpack", "keyboard"),
        *("phone case", "blender", "toaster", "kettle", "bread knife", "picture frame", "tent"),
        *("sleeping bag", "bicycle pump", "helmet", "bookshelf", "garden hose", "vacuum cleaner"),
        *("wall clock", "mirror", "headset", "speaker", "webcam", "monitor", "printer", "router"),
        *("tablet", "laptop stand", "mouse", "microphone", "guitar", "drum kit", "yoga mat"),
        *("dumbbell", "kitchen scale", "frying pan", "teapot", "wine rack", "pillow", "blanket"),
        *("mattress", "curtain", "carpet", "lawn mower", "drill", "toolbox", "ladder", "paint set"),
        *("board game", "puzzle", "toy train", "doll house", "pram", "car seat", "dog bed"),
        *("cat tree", "fish tank", "camera", "tripod", "suitcase", "wallet", "watch", "necklace"),
    ),
    "part": (
        *("lid", "handle", "screen", "hinge", "button", "base", "display", "cover", "frame"),
        *("left side", "right side", "corner", "top", "bottom", "front", "back", "zip", "wheel"),
    ),
    "accessory": (
        *("charger", "power cable", "manual", "bag of screws", "remote control", "battery"),
        *("adapter", "carrying strap", "spare filter", "mounting bracket", "warranty card"),
    ),
    "broken": (
        *("broken", "cracked", "scratched", "bent", "dented", "shattered", "smashed", "torn"),
        *("chipped", "crushed", "damaged", "split"),
    ),
    "late": (
        *("has not arrived", "is still not here", "never showed up", "has not been delivered"),
        *("is late", "is overdue", "is delayed", "did not come", "was never delivered"),
    ),
    "missing": ("missing", "not in the box", "left out", "absent", "not included", "forgotten"),
    "money": ("refund", "money back", "reimbursement", "repayment", "money returned"),
    "twice": ("twice", "two times", "double", "three times", "too much", "the wrong amount"),
    "login": ("log in", "sign in", "get into my account", "access my account", "open my account"),
    "cancel": ("cancel", "call off", "withdraw", "stop", "annul"),
    "instead": ("instead of", "rather than", "in place of", "and not"),
    "now": (
        *("immediately", "right away", "at once", "as soon as possible", "without delay"),
        *("within the hour", "today", "by tonight", "by tomorrow morning"),
    ),
    "angry": (
        *("unacceptable", "a disgrace", "outrageous", "very poor service", "really annoying"),
        *("a scandal", "deeply disappointing", "terrible"),
    ),
    "calm": (
        *("no rush", "no hurry", "take your time", "not urgent", "whenever you have a moment"),
        *("it can wait", "not pressing", "at your leisure"),
    ),
    "span": (
        *("two weeks", "three weeks", "ten days", "a month", "six days", "four weeks", "a while"),
        *("eight days", "two months", "five days"),
    ),
    "colour": (
        *("red", "blue", "green", "black", "white", "grey", "yellow", "brown", "purple", "pink"),
        *("silver", "beige"),
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        *("January", "February", "March", "April", "May", "June", "July", "August"),
        *("September", "October", "November", "December"),
    ),
    "city": (
        *("Berlin", "Lyon", "Porto", "Leeds", "Dublin", "Turin", "Vienna", "Oslo", "Gdansk"),
        *("Utrecht", "Seville", "Boston", "Denver", "Toronto", "Austin", "Geneva", "Prague"),
        *("Helsinki", "Athens", "Malmo", "Ghent", "Zagreb", "Riga", "Cork", "Bristol"),
    ),
    "name": (
        *("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas"),
        *("Kofi", "Lena", "Marco", "Nadia", "Olga", "Pavel", "Quentin", "Rosa", "Samir", "Tessa"),
        *("Uma", "Viktor", "Wendy", "Ximena", "Yusuf", "Zoe", "Amara", "Bruno", "Chloe", "Diego"),
        *("Emma", "Felix", "Gita", "Hannah", "Ivan", "Julia", "Kenji", "Laura", "Mina", "Noah"),
    ),
    "surname": (
        *("Becker", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Hansen", "Ito", "Jansen"),
        *("Kaya", "Larsen", "Moreau", "Novak", "Okafor", "Petrov", "Rossi", "Silva", "Tanaka"),
        *("Ueda", "Vargas", "Walker", "Young", "Zhang", "Murphy", "Singh", "Lopez", "Schmidt"),
    ),
    "relative": (
        *("mother", "father", "sister", "brother", "daughter", "son", "aunt", "uncle", "friend"),
        *("neighbour", "colleague", "grandmother"),
    ),
    "room": ("kitchen", "office", "garage", "bedroom", "garden", "hallway", "attic", "studio"),
}

COMPLAINTS: Mapping[str, Templates] = {
    "damaged_item": {
        "train": (
            "the {product} arrived {broken}",
            "when I opened the box the {part} of the {product} was {broken}",
            "the {part} is {broken} and I cannot use it",
            "my {product} came with a {broken} {part}",
            "there is a {broken} {part} on the {product} you sent",
            "I unpacked the {product} and found it {broken}",
            "the parcel was wet and the {product} inside is {broken}",
            "sadly the {product} is {broken}, above all the {part}",
            "it seems that the courier dropped it: the {part} is {broken}",
            "the {colour} {product} was {broken} on delivery",
            "one side of the {product} is {broken} and the {part} is {broken2}",
            "why is the {part} of a new {product} {broken}?",
            "{any} {product} {any2} {broken} {any3}",
            "{any} {broken} {part} {any2} {product}",
            "{product} {any} {part} {any2} {broken}",
        ),
        "held-out": (
            "the {part} was already {broken} when the {product} reached me",
            "out of the box, the {product} had a {broken} {part}",
            "I am looking at a {product} that is {broken} at the {part}",
            "what I got is a {product} whose {part} is {broken}",
            "the {product} turned up {broken}, the {part} is {broken2}",
        ),
    },
    "wrong_item": {
        "train": (
            "I ordered a {product} but received a {product2}",
            "you sent me a {product2} {instead} the {product}",
            "the box contained a {product2}, not the {product} I ordered",
            "this is the wrong item: I asked for a {product}, not for a {product2}",
            "I got the wrong item, a {product2} {instead} my {product}",
            "the colour is wrong, the {product} should be {colour} and it is {colour2}",
            "someone mixed up the parcels: I have a {product2} here that I never ordered",
            "a {product2} came today although I bought a {product}",
            "I unpacked a {colour2} {product} {instead} a {colour} one",
            "there was a {product2} in my parcel {instead} the {product} I paid for",
            "you delivered the {colour2} {product}, I had chosen the {colour} one",
            "why did I get a {product2} when I ordered a {product}?",
            "{any} {product2} {instead} {any2} {product}",
            "{any} ordered {any2} {product} {any3} received {product2}",
            "{any} wrong item {any2} {product2} {any3}",
            "{any} {product} {any2} delivered {any3} {product2}",
            "{any} {colour} {product} {any2} {instead} {colour2}",
        ),
        "held-out": (
            "in the parcel was a {product2} {instead} the {product} I had chosen",
            "the {product2} you sent is the wrong item, I ordered a {product}",
            "I asked for a {product} and you delivered a {product2}",
            "I bought a {product} and got a {product2} {instead} it",
            "I ordered it in {colour} and received a {colour2} {product}",
        ),
    },
    "late_delivery": {
        "train": (
            "my {product} {late}",
            "I have been waiting {span} for the {product}",
            "the {product} was due on {day} and {late}",
            "tracking has not moved for {span}",
            "the parcel with the {product} is stuck in {city}",
            "where is my {product}? it {late}",
            "first it was {day}, then {day2}, and the {product} {late}",
            "it has been {span} and the {product} {late}",
            "delivery of the {product} was promised for {day} and nothing came",
            "still no sign of the {product} after {span}",
            "I wait at home every {day} and the parcel {late}",
            "the shipment left {city} {span} ago and {late}",
            "{any} {product} {late} {any2}",
            "{any} {span} {any2} waiting {any3} {product}",
            "{any} {any2} shipment {late} {any3}",
        ),
        "held-out": (
            "after {span} of waiting the {product} {late}",
            "the {product} was promised for {day} but it {late}",
            "I am still waiting for the {product}, it {late}",
            "the shipment {late}, tracking says it is stuck in {city}",
            "I was home on {day} but the {product} {late}",
        ),
    },
    "missing_part": {
        "train": (
            "the {accessory} of the {product} is {missing}",
            "there was no {accessory} with my {product}",
            "the {product} came without the {accessory}",
            "I cannot find the {accessory}, it was {missing}",
            "the {product} is fine but the {accessory} was {missing}",
            "the list says one {accessory}, yet it is {missing}",
            "I need the {accessory} that was {missing}",
            "somebody forgot to pack the {accessory} for the {product}",
            "the box has the {product} but no {accessory}",
            "please send the {accessory}, it was {missing}",
            "both the {accessory} and the {accessory2} are {missing}",
            "without the {accessory}, which is {missing}, the {product} is useless",
            "{any} {accessory} {any2} {missing} {any3}",
            "{any} {product} {any2} without {any3} {accessory}",
            "no {accessory} {any} {any2} {product}",
        ),
        "held-out": (
            "I found everything except the {accessory}, which is {missing}",
            "my {product} was packed without its {accessory}",
            "for the {product} the {accessory} is {missing}",
            "one {accessory} was {missing} when I opened the box of the {product}",
            "no {accessory} came with the {product}, it must have been {missing}",
        ),
    },
    "refund": {
        "train": (
            "I returned the {product} {span} ago and the {money} has not come",
            "when will I get my {money} for the {product}?",
            "I sent the {product} back and still wait for my {money}",
            "the {money} for the {product} is not on my card yet",
            "you confirmed the return of the {product}, but where is the {money}?",
            "I would like my {money} for the {product}",
            "the return was accepted {span} ago, the {money} never came",
            "I gave the {product} back and want the {money}",
            "your shop owes me the {money} of {amount} for a returned {product}",
            "I was told the {money} takes {span}, but nothing was paid out",
            "please pay out the {money} for the {product} I returned",
            "the {product} went back on {day} and no {money} so far",
            "{any} {money} {any2} {product}",
            "{any} {product} {any2} returned {any3} {money}",
            "{money} {any} {any2} {any3}",
        ),
        "held-out": (
            "since I returned the {product} I have waited for the {money}",
            "you got the {product} back {span} ago, please send the {money}",
            "I am asking for my {money}, the {product} was returned on {day}",
            "no {money} has come for the {product} that I gave back",
            "how long does the {money} for a returned {product} take?",
        ),
    },
    "billing": {
        "train": (
            "I was charged {twice} for the {product}",
            "my card was billed {twice}",
            "the invoice says {amount} but the price was {amount2}",
            "you took {amount} from my card {twice}",
            "the discount code was not applied to my invoice",
            "the bill for the {product} is wrong, I paid {twice}",
            "my bank shows that you charged me {twice}",
            "the invoice for the {product} has an error: the tax is wrong",
            "why did you charge {amount} when the {product} costs {amount2}?",
            "I see two payments of {amount} on my card for one {product}",
            "the shipping fee was charged {twice}",
            "I need a corrected invoice for the {product}",
            "{any} charged {any2} {twice}",
            "{any} billed {twice} {any2} {product}",
            "{any} invoice {any2} {amount} {any3}",
            "{any} {any2} bank {any3} {twice}",
        ),
        "held-out": (
            "for the {product} my bank account was charged {twice}",
            "there is an error on the invoice: it says {amount} and not {amount2}",
            "you billed me {twice} for one {product}",
            "according to my bank the {product} was billed {twice}",
            "please look at my invoice, the discount code was not applied",
        ),
    },
    "account": {
        "train": (
            "I cannot {login}",
            "the password reset email never comes and I cannot {login}",
            "my account is locked after {count} attempts",
            "your site says that my password is wrong when I {login}",
            "each time I try to {login} the page crashes",
            "I forgot my password and the reset link does not work",
            "please change the email address of my account",
            "the app logs me out whenever I {login}",
            "it is not possible to {login} since {day}",
            "how do I {login} with a new phone?",
            "the code you text me to {login} is never accepted",
            "my user name is unknown when I want to {login}",
            "{any} {login} {any2}",
            "{any} password {any2} {any3}",
            "{any} {any2} account {any3} locked",
        ),
        "held-out": (
            "since {day} I fail to {login}, the password is never accepted",
            "when I try to {login} I see that my account is locked",
            "the reset link for my password does not come, so I cannot {login}",
            "your app does not let me {login}",
            "I tried {count} times to {login}, it says wrong password",
        ),
    },
    "cancellation": {
        "train": (
            "please {cancel} my order for the {product}",
            "I want to {cancel} the order",
            "I no longer need the {product}, please {cancel} the order",
            "I changed my mind about the {product}, do not ship it",
            "can you {cancel} the {product} before it is shipped?",
            "I bought the {product} by mistake and want to {cancel}",
            "kindly {cancel} my purchase of the {product}",
            "do not send the {product}, I would like to {cancel}",
            "I have to {cancel} because I found the {product} elsewhere",
            "my {relative} already has a {product}, so please {cancel} it",
            "is it possible to {cancel} the purchase?",
            "we {cancel} the order of {day}, the {product} is not needed",
            "{any} {cancel} {any2} {product}",
            "{any} {any2} {cancel} {any3} order",
            "{product} {any} {cancel} {any2}",
        ),
        "held-out": (
            "I would like to {cancel} the purchase of the {product}",
            "since my mind has changed about the {product}, {cancel} the order",
            "could you {cancel} it? I no longer want the {product}",
            "do not ship the {product}, my {relative} found one elsewhere and we {cancel}",
            "it was a mistake to order the {product}, {cancel} it",
        ),
    },
    "question": {
        "train": (
            "does the {product} work with a {accessory}?",
            "is the {product} also available in {colour}?",
            "how do I clean the {product}?",
            "could you tell me how heavy the {product} is?",
            "what is the size of the {product}?",
            "is the {product} suitable for the {room}?",
            "do you ship the {product} to {city}?",
            "I wonder whether the {product} fits in my {room}",
            "which {accessory} do you recommend for the {product}?",
            "will the {colour} {product} be in stock in {month}?",
            "can I use the {product} in the {room}?",
            "I would like to know if the {product} is made in {city}",
            "{any} {product} {any2} {room}?",
            "{any} {any2} {product} available {any3}?",
            "{any} {accessory} suitable {any2} {product}?",
            "{any} {any2} size {any3} {product}?",
            "{any} recommend {any2} {product} {any3} {room}?",
        ),
        "held-out": (
            "I wonder if the {product} is available in {colour}",
            "is the {accessory} suitable for a {product}, do you know?",
            "can you tell me the size of the {colour} {product}?",
            "could I use the {product} in my {room}?",
            "do you recommend the {product} for a {room}?",
        ),
    },
}

# What may stand before a complaint, of any category.
LEADS: Templates = {
    "train": (
        *("so,", "well,", "listen,", "to be honest,", "one thing:", "the problem:", "my issue:"),
        *("as I said,", "it is like this:", "briefly:", "I noticed something:", "once again:"),
    ),
    "held-out": ("frankly,", "in short:", "my problem:", "as I noticed,"),
}

URGENCY: Mapping[str, Templates] = {
    "urgent": {
        "train": (
            "I need an answer {now}",
            "please reply {now}",
            "this is urgent",
            "it has to be solved {now}",
            "this must be fixed {now}, it is an emergency",
            "help me {now}",
            "I leave on {day}, so please act {now}",
            "call me {now}, please",
            "urgent: my {relative} needs it {now}",
            "I expect a solution {now}",
            "{any} {any2} {now}",
            "{any} {any2} {any3} {any4} {now}",
            "{now} {any} {any2} {any3}",
            "{any} emergency {any2} {now}",
            "{any} urgent {any2} {any3} {now}",
        ),
        "held-out": (
            "please solve this {now}",
            "it is urgent and I need help {now}",
            "my {relative} needs an answer {now}",
            "an emergency, please call {now}",
        ),
    },
    "high": {
        "train": (
            "this is {angry}",
            "I find it {angry} that nobody answers",
            "I write for the {count}th time, it is {angry}",
            "your shop is {angry}",
            "I will leave a bad review, this is {angry}",
            "what happened here is {angry}",
            "my lawyer also thinks it is {angry}",
            "honestly, {angry}",
            "I have complained before and it is {angry}",
            "that is {angry} and I will tell everybody",
            "{any} {any2} {angry}",
            "{any} {any2} {any3}, {angry}",
            "{angry}, {any} {any2} {any3}",
            "{any} {any2} {angry} {any3} {any4}",
        ),
        "held-out": (
            "I think this is {angry}",
            "for a shop like yours it is {angry}",
            "nobody answers me, {angry}",
            "I have to say that it is {angry}, expect a bad review",
        ),
    },
    "low": {
        "train": (
            "{calm}",
            "{calm}, I am patient",
            "for me it is fine, {calm}",
            "as for time: {calm}",
            "{calm}, next week is fine",
            "I know you are busy, so {calm}",
            "please answer when you can, {calm}",
            "{calm} on my side",
            "thanks in advance and {calm}",
            "nothing dramatic, {calm}",
            "{any} {any2} {any3}, {calm}",
            "{any} {any2}: {calm}",
            "{calm}, {any} {any2} {any3}",
            "{calm} {any} {any2} {any3} {any4}",
        ),
        "held-out": (
            "I am in no way stressed, {calm}",
            "{calm}, an answer next week is fine",
            "you are surely busy: {calm}",
            "{calm} as far as I am concerned",
        ),
    },
}

ORDER: Templates = {
    "train": (
        "my order number is {order}",
        "it is about order {order}",
        "order {order}",
        "order id: {order}",
        "the order ({order}) was placed on {day}",
        "you can find it under order {order}",
        "I placed order {order} in {month}",
        "reference: order {order}",
        "this concerns my order {order} of {month} {year}",
        "the confirmation email shows order number {order}",
        "order no. {order}, paid by card",
        "on the receipt I see {order} as the order number",
        "{order} is my order",
        "regarding {order}, the order I placed from {city}",
        "{any} order {order}",
        "{any} order {order} {any2} {any3}",
        "{any} {any2} order {order} {any3}",
        "order {order} {any} {any2}",
        "{order} {any} order number",
        "{order} {any} {any2} order",
        "{order} {any} {any2} order id {any3}",
        "{any} {any2} {any3} order, {order}",
        "order number {any} {any2} {order}",
        "{any} {any2} order id {order} {any3}",
        "{any} number {any2} order {any3} {order}",
        "{any} order: {order} {any2}",
    ),
    "held-out": (
        "the number of my order is {order}",
        "I am writing about order {order}",
        "see order {order} of {day}",
        "the receipt shows order id {order}",
        "{order} is the order number",
        "in {month} I placed an order, {order}",
    ),
}

NO_ORDER: Templates = {
    "train": (
        "I do not have the order number at hand",
        "the order number is lost",
        "sorry, I cannot find the order id",
        "there is no order yet",
        "I deleted the email with the order number",
        "{any} order number {any2} {any3}",
        "{any} {any2} the order id {any3}",
        "{any} {any2} {any3} order number",
    ),
    "held-out": (
        "sorry, the order number is not at hand",
        "I lost the email with the order id",
    ),
}

SMALL_TALK: Templates = {
    "train": (
        "I have been a customer for {count} years",
        "I paid {amount} by card",
        "I bought it on {day}",
        "you can reach me at {phone}",
        "I live in {city}",
        "my customer number is {customer}",
        "the model is {model}",
        "it was meant as a gift for my {relative}",
        "I attach {count} photos",
        "my {relative} recommended your shop",
        "the {colour} one looks great by the way",
        "it is for the {room}",
        "my address is {count} Station Road, {postcode} {city}",
        "I also bought a {product2} last year and it is great",
        "we moved to {city} in {year}",
        "the price was {amount}",
        "my phone number is {phone}",
        "I wrote to {name2} on {day} about it",
        "I am {name} from {city}",
        "the weather in {city} is nice",
        "thank you for the newsletter in {month}",
        "the courier was friendly",
        "your colleague {name2} was kind on the phone",
        "I read {count} good reviews about your shop",
        "the box was {count} cm wide",
        "my {relative} turns {count} in {month}",
        "{any} {any2} {count} {any3}",
        "{customer} {any} {any2} {any3}",
        "{any} {customer} {any2}",
        "customer {any} {customer} {any2}",
        "{any} {any2} {year} {any3}",
        "{any} {any2} {phone}",
        "{any} {model} {any2} {any3}",
        "{any} {any2} {amount}",
        "{any} {any2} {any3} {any4}",
        "{any} {any2} {name2} {any3} {relative}",
        "{any} {any2} {product2} {any3}",
        "{any} {city} {any2} {count} {any3}",
    ),
    "held-out": (
        "for {count} years I have bought from your shop",
        "I paid by card, {amount}",
        "my phone is {phone}",
        "it is a gift for {name2}, my {relative}",
        "I have photos, {count} of them",
        "we live at {count} Station Road in {city}",
        "customer number {customer} is mine",
        "it is the model {model}",
        "last year my {relative} bought a {product2} from you",
        "on {day} I talked to {name2} on the phone",
        "the reviews in {year} were good",
        "in {city} the weather is great",
    ),
}

GREETINGS: Templates = {
    "train": (
        *("Hi,", "Hello,", "Good morning,", "Dear support,", "Hey,", "Dear {name2},"),
        *("Hello {name2},", "To whom it may concern,"),
    ),
    "held-out": ("Hi {name2},", "Dear support team,", "Good evening,", "Hello support,"),
}

SIGN_OFFS: Templates = {
    "train": (
        *("Thanks, {name}", "Regards, {name} {surname}", "Best, {name}", "Cheers", "Thank you"),
        *("Yours, {surname}", "{name} {surname}, {city}"),
    ),
    "held-out": ("Many thanks, {name} {surname}", "Best regards, {name}", "{name} from {city}"),
}

HEADERS: Templates = {
    "train": (
        "channel: email",
        "channel: chat",
        "from: {name} {surname}",
        "channel: web form\nfrom: {name} {surname}, {postcode} {city}",
        "Subject: {product}\nFrom: {name}",
        "[{day}, {city}]",
        "ticket of {day}, phone {phone}",
    ),
    "held-out": (
        "channel: phone",
        "from: {name}, {city}",
        "Subject: my {product}\nFrom: {name} {surname}",
        "[{month} {year}]",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write tickets to stdout, one JSON object per line."""
    parser = argparse.ArgumentParser(description="Synthetic support tickets as JSON lines.")
    parser.add_argument("--split", choices=get_args(Split), default="held-out")
    parser.add_argument("--num", type=int, default=500, help="how many tickets (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for ticket in tickets(options.split, options.num, options.seed):
        sys.stdout.write(json.dumps(asdict(ticket)) + "\n")


if __name__ == "__main__":
    main()
