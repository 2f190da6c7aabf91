"""Make the bundled miniature of Super-NaturalInstructions, in the official file format.

A closed world of some hundred words (people, cities, things, opposites, numbers) is drawn into
lists, sentences and little stories. A task is a definition and two functions: `source` draws facts
whose .text is the input, and `answer` derives the output from them, so that answers are right by
construction. One source serves many tasks: only the definition says what to do. There are three
groups: PRETRAIN (the base learns the words and to read a definition), TRAIN (new uses of the same
words, for the adapters) and TEST (each task recombines what TRAIN teaches). Every run writes the
same bytes.

    python sni/make_sni.py                         # write tasks/, splits/ and own.jsonl here
    python sni/make_sni.py --check                 # compare the files on disk with these
    python sni/make_sni.py --out DIR               # write them to another folder

Test: pytest tests/repo/test_sni_bundled.py
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------- the world
# No word stands in two classes, so that "the animal of the list" has one answer.


def pairs(text: str) -> dict[str, str]:
    """Return {a: b, c: d} for "a-b c-d"."""
    return dict(pair.split("-") for pair in text.split())


WOMEN = "Anna Mia Lucy Emma Rosa Clara Nora Alice Ella Jane Ruth Sara Olga Ida Vera Zoe".split()
MEN = "Tom Ben Paul Jack Oscar Felix Hugo Adam Max Leo Simon Peter Karl Ivan Noah Erik".split()
NAMES = WOMEN + MEN
COUNTRY = pairs(
    "Paris-France Rome-Italy Berlin-Germany Madrid-Spain London-England Dublin-Ireland "
    "Oslo-Norway Athens-Greece Cairo-Egypt Tokyo-Japan Delhi-India Lima-Peru Vienna-Austria "
    "Warsaw-Poland Lisbon-Portugal Moscow-Russia"
)
WORKPLACE = pairs(
    "teacher-school doctor-hospital baker-bakery farmer-farm waiter-restaurant judge-court "
    "cook-kitchen pilot-airport sailor-harbour actor-theatre librarian-library priest-church "
    "chemist-laboratory banker-bank miner-mine gardener-garden"
)
WORKER = {place: job for job, place in WORKPLACE.items()}
YOUNG = pairs(
    "dog-puppy cat-kitten cow-calf horse-foal goat-kid hen-chick duck-duckling pig-piglet bear-cub "
    "goose-gosling owl-owlet frog-tadpole"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
CLASSES = {
    "animal": [*YOUNG, *"mouse wolf lion tiger rabbit monkey fox camel".split()],
    "fruit": "apple lemon pear cherry peach plum banana melon grape fig".split(),
    "vegetable": "potato onion carrot cabbage bean pea leek turnip radish beetroot".split(),
    "garment": "coat hat shirt dress glove skirt boot sock belt jacket".split(),
    "tool": "hammer shovel brush ladder bucket axe knife rope needle rake".split(),
    "instrument": "drum flute violin piano guitar trumpet harp cello".split(),
    "vehicle": "car bus train boat ship bicycle truck plane tram van".split(),
    "colour": "red blue green yellow white black brown pink purple grey".split(),
    "month": MONTHS,
    "city": [*COUNTRY],
    "job": [*WORKPLACE],
}
CLASS_OF: dict[str, str] = {}
for _kind, _words in CLASSES.items():
    CLASS_OF |= dict.fromkeys(_words, _kind)
THINGS = CLASSES["garment"] + CLASSES["tool"] + CLASSES["instrument"] + CLASSES["vehicle"]
NOUNS = CLASSES["animal"] + CLASSES["fruit"] + CLASSES["vegetable"] + THINGS
OPPOSITE = pairs(
    "big-small old-new heavy-light wet-dry clean-dirty cheap-expensive ugly-pretty strong-weak "
    "long-short thick-thin hard-soft rough-smooth hot-cold fast-slow full-empty loud-quiet "
    "high-low wide-narrow sharp-blunt bright-dark safe-dangerous sweet-sour happy-sad "
    "brave-afraid"
)
# Adjectives that fit any thing: the first 12 pairs.
OF_THINGS: list[str] = []
for _pair in [*OPPOSITE.items()][:12]:
    OF_THINGS += _pair
OPPOSITE |= {right: left for left, right in OPPOSITE.items()}
PAST = pairs(
    "buy-bought sell-sold find-found lose-lost see-saw draw-drew choose-chose hide-hid "
    "bring-brought take-took steal-stole keep-kept want-wanted need-needed paint-painted "
    "wash-washed watch-watched carry-carried move-moved love-loved share-shared borrow-borrowed "
    "order-ordered repair-repaired"
)
UP = [str(n) for n in range(100)]
NUMBER_NAME = pairs(
    "0-zero 1-one 2-two 3-three 4-four 5-five 6-six 7-seven 8-eight 9-nine 10-ten 11-eleven "
    "12-twelve 13-thirteen 14-fourteen 15-fifteen 16-sixteen 17-seventeen 18-eighteen "
    "19-nineteen 20-twenty"
)
GOOD = "wonderful lovely excellent great perfect pleasant superb fantastic amazing charming".split()
BAD = (
    "terrible awful horrible nasty dreadful disappointing boring unpleasant dull miserable".split()
)
ASPECTS = "food music service room view breakfast concert hotel weather coffee".split()
IRREGULAR = pairs("mouse-mice goose-geese wolf-wolves knife-knives potato-potatoes")
YES_NO = ("Yes", "No")


def plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return IRREGULAR.get(noun, noun + ending)


def a(words: str) -> str:
    """Return the words with their indefinite article."""
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def yes(flag: bool) -> str:
    return "Yes" if flag else "No"


def comma(words: list[str]) -> str:
    return ", ".join(words)


# -------------------------------------------------------------------------- sources: draw the facts


class Facts(SimpleNamespace):
    """What a source has drawn. .text is the input. Answers and explanations use the rest."""


Source = Callable[[Random], Facts]


def of(facts: Facts, kind: str) -> list[str]:
    """Return the words of a class."""
    return [word for word in facts.words if CLASS_OF[word] == kind]


def as_list(words: list[str]) -> Facts:
    return Facts(text=comma(words), words=words)


def listing(low: int, high: int, pool: list[str]) -> Source:
    """Return a source of lists of `low` to `high` different words of the pool."""
    return lambda rng: as_list(rng.sample(pool, rng.randrange(low, high + 1)))


def mixed(rng: Random, low: int = 4, high: int = 6) -> Facts:
    """Draw a list of words from three classes."""
    pool = []
    for kind in rng.sample([*CLASSES], 3):
        pool += CLASSES[kind]
    return listing(low, high, pool)(rng)


def one_class(rng: Random, strangers: int = 0) -> Facts:
    """Draw three words of one class, and `strangers` words of another."""
    many, other = rng.sample([*CLASSES], 2)
    words = rng.sample(CLASSES[many], 3) + rng.sample(CLASSES[other], strangers)
    return as_list(rng.sample(words, len(words)))


def adjectives(count: int) -> Source:
    """Return a source of lists of adjectives. At least half have a word and its opposite."""

    def draw(rng: Random) -> Facts:
        words = rng.sample([*OPPOSITE], count)
        if rng.random() < 0.5 and OPPOSITE[words[0]] not in words:
            words[-1] = OPPOSITE[words[0]]
        return as_list(rng.sample(words, count))

    return draw


def sequence(*scales: list[str]) -> Source:
    """Return a source of the start of a stretch of one of the scales, and what follows it."""

    def draw(rng: Random) -> Facts:
        scale = rng.choice(scales)
        length = rng.randrange(2, 5)
        start = rng.randrange(len(scale) - length)
        *shown, following = scale[start : start + length + 1]
        return Facts(text=comma(shown), following=following, last=shown[-1])

    return draw


def event(rng: Random) -> Facts:
    """Draw one sentence: who did what to which thing, where and when, in different orders."""
    who = rng.choice(NAMES)
    job = rng.choice([*WORKPLACE])
    base = rng.choice([*PAST])
    city = rng.choice([*COUNTRY])
    adj = rng.choice(OF_THINGS)
    thing = rng.choice(THINGS)
    day = rng.choice(DAYS)
    deed = f"{PAST[base]} {a(adj)} {thing}"
    core = f"{who} the {job} {deed}"
    text = rng.choice(
        (
            f"{core} in {city} on {day}.",
            f"On {day}, {core} in {city}.",
            f"In {city}, {core} on {day}.",
        )
    )
    return Facts(
        text=text,
        core=core,
        deed=deed,
        who=who,
        job=job,
        base=base,
        past=PAST[base],
        adj=adj,
        thing=thing,
        city=city,
        day=day,
    )


def asking(source: Source, question: str) -> Source:
    """Return the same source with a question about the facts at the end of the text."""

    def draw(rng: Random) -> Facts:
        facts = source(rng)
        facts.text += " Question: " + question.format(**vars(facts))
        return facts

    return draw


def owners(rng: Random) -> Facts:
    """Draw three people, each with a coloured thing.

    `claimed` may be the thing of `who`. `asked` may be in the story.
    """
    who = rng.sample(NAMES, 4)
    colour = rng.sample(CLASSES["colour"], 3)
    thing = rng.sample(THINGS, 3)
    story = [f"{who[i]} has {a(colour[i])} {thing[i]}." for i in rng.sample(range(3), 3)]
    return Facts(
        text=" ".join(story),
        who=who[0],
        colour=colour[0],
        thing=thing[0],
        other=who[1],
        other_colour=colour[1],
        other_thing=thing[1],
        claimed=rng.choice(thing[:2]),
        asked=rng.choice((who[0], who[3])),
    )


def counts(rng: Random) -> Facts:
    """Draw three people with different numbers of the same thing. One is `asked` about."""
    held = sorted(rng.sample(range(2, 100), 3))
    who = rng.sample(NAMES, 3)
    things = plural(rng.choice(NOUNS))
    story = [f"{who[i]} has {held[i]} {things}." for i in rng.sample(range(3), 3)]
    i = rng.randrange(3)
    return Facts(
        text=" ".join(story),
        least=who[0],
        most=who[2],
        fewest=held[0],
        largest=held[2],
        things=things,
        asked=who[i],
        amount=held[i],
        another=held[i - 1],
    )


def both(rng: Random) -> Facts:
    """Draw two people with small numbers of the same thing. The first has more."""
    who, other = rng.sample(NAMES, 2)
    things = plural(rng.choice(NOUNS))
    less, more = sorted(rng.sample(range(2, 11), 2))
    return Facts(
        text=f"{who} has {more} {things}. {other} has {less} {things}.",
        other=other,
        more=more,
        less=less,
        things=things,
    )


def trip(rng: Random) -> Facts:
    """Draw a person who goes to two or three places. `asked` may be one of them."""
    who = rng.choice(NAMES)
    places = rng.sample([*WORKER], 4)
    visited = places[: rng.randrange(2, 4)]
    they = "She" if who in WOMEN else "He"
    story = [f"{who} went to the {visited[0]}."]
    for place in visited[1:]:
        story.append(f"{they} then went to the {place}.")
    return Facts(
        text=" ".join(story),
        who=who,
        first=visited[0],
        last=visited[-1],
        places=visited,
        asked=rng.choice((rng.choice(visited), places[3])),
    )


def review(rng: Random) -> Facts:
    """Draw two things, each good or bad. `good` and `bad` name the only one that was so."""
    first, second = rng.sample(ASPECTS, 2)
    good = rng.random() < 0.5, rng.random() < 0.5
    felt = [rng.choice(GOOD if g else BAD) for g in good]
    text = (
        f"{rng.choice(NAMES)} went to {rng.choice([*COUNTRY])}. "
        f"The {first} was {felt[0]}. The {second} was {felt[1]}."
    )
    mood = ("negative", "mixed", "positive")[sum(good)]
    named = dict(zip(good, (first, second), strict=True))
    return Facts(
        text=text, first=first, second=second, mood=mood, good=named.get(True), bad=named.get(False)
    )


def card(*fields: str) -> Source:
    """Return a source of "field: value; field: value" in any order."""

    def draw(rng: Random) -> Facts:
        value = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS)}
        value |= {kind: rng.choice(CLASSES[kind]) for kind in ("job", "city", "colour")}
        shown = rng.sample(fields, len(fields))
        return Facts(text="; ".join(f"{field}: {value[field]}" for field in shown), **value)

    return draw


def phrase(template: str) -> Source:
    """Return a source of one short sentence.

    It has a person, a job and its place, a young animal, or a thing and its adjective.
    """

    def draw(rng: Random) -> Facts:
        job = rng.choice([*WORKPLACE])
        animal = rng.choice([*YOUNG])
        facts = Facts(
            who=rng.choice(NAMES),
            job=job,
            place=WORKPLACE[job],
            animal=animal,
            young=YOUNG[animal],
            thing=rng.choice(THINGS),
            adj=rng.choice(OF_THINGS),
        )
        facts.text = template.format(**vars(facts))
        return facts

    return draw


# -------------------------------------------------------------------------------- what makes a task


# The right outputs, or None if these facts do not suit the task and others must be drawn.
Answer = Callable[[Facts], str | list[str] | None]


class Task(NamedTuple):
    name: str
    category: str
    definition: str
    source: Source
    answer: Answer
    wrong: Callable[[Facts], str] | None  # a typical mistake; None: another label
    why: str | dict[str, str]  # explains a right answer, perhaps for each label
    why_not: str | dict[str, str]  # explains why the wrong one is wrong
    labels: tuple[str, ...] = ()


# Categories.
LIST = "List Operations"
WORD = "Word Semantics"
RELATION = "Word Relations"
NUMBER = "Number Reasoning"
EXTRACT = "Information Extraction"
QA = "Question Answering"
REWRITE = "Sentence Rewriting"
TITLE = "Title Generation"
QUESTION = "Question Generation"
COMPLETE = "Text Completion"
SENTIMENT = "Sentiment Analysis"
DATA = "Data to Text"
VERIFY = "Fact Verification"
ANSWERABLE = "Answerability Classification"


def word(index: int) -> Callable[[Facts], str]:
    return lambda f: f.words[index]


def text(f: Facts) -> str:
    return f.text


def articles(*words: str) -> list[str]:
    """Return a noun phrase in three forms, which are all right."""
    noun = " ".join(words)
    return [noun, a(noun), f"the {noun}"]


def after(kind: str) -> Answer:
    """Return an answer: the word behind the only word of the class."""

    def answer(f: Facts) -> str | None:
        found = of(f, kind)
        if len(found) != 1 or found[0] == f.words[-1]:
            return None
        return f.words[f.words.index(found[0]) + 1]

    return answer


def opposed(f: Facts) -> bool:
    """Return whether a word and its opposite are in the list."""
    return any(OPPOSITE[word] in f.words for word in f.words)


# Families: the same task with another word in one place of its definition, which must be read so.


def nth_word(ordinal: str, index: int) -> Task:
    return Task(
        f"{ordinal}_word_of_list",
        LIST,
        "You are given a list of words separated by commas. "
        f"Write the {ordinal} word of the list and nothing else.",
        mixed,
        word(index),
        word(0 if index else -1),
        f"'{{out}}' is the {ordinal} word.",
        f"'{{wrong}}' is not the {ordinal} word.",
    )


def find_the(kind: str) -> Task:
    return Task(
        f"find_the_{kind}",
        LIST,
        f"Exactly one word of the list is {a(kind)}. Find the {kind} in the list and write it.",
        mixed,
        lambda f: of(f, kind)[0] if len(of(f, kind)) == 1 else None,
        word(0),
        f"Only '{{out}}' is {a(kind)}.",
        f"'{{wrong}}' is not {a(kind)}.",
    )


def all_of(kind: str) -> Task:
    kinds = plural(kind)

    def answer(f: Facts) -> list[str] | None:
        found = of(f, kind)
        if len(found) < 2:
            return None
        return [comma(list(order)) for order in permutations(found)][:4]

    return Task(
        f"all_{kinds}_of_list",
        LIST,
        f"Some words of the given list are {kinds}. Write all the {kinds}, separated by commas, in "
        "any order, and leave the other words out.",
        mixed,
        answer,
        lambda f: of(f, kind)[0],
        f"These are all the {kinds}.",
        f"These are not all the {kinds}.",
    )


def count_of(kind: str, definition: str) -> Task:
    kinds = plural(kind)
    return Task(
        f"count_the_{kinds}",
        NUMBER,
        definition,
        mixed,
        lambda f: str(len(of(f, kind))),
        None,
        f"The number of {kinds} is {{out}}.",
        f"The number of {kinds} is not {{wrong}}.",
        ("0", "1", "2", "3"),
    )


def of_each(noun: str, what: str, table: dict[str, str], pool: list[str], low: int) -> Task:
    return Task(
        f"{what.replace(' ', '_')}_of_each_{noun}",
        WORD,
        f"You are given {plural(noun)} separated by commas. Write the {what} of each {noun}, in "
        "the same order, separated by commas.",
        listing(low, 3, pool),
        lambda f: comma([table[w] for w in f.words]),
        text,
        f"This is the {what} of each {noun}.",
        f"The {plural(noun)} were only copied.",
    )


def extreme_number(which: str, pick: Callable) -> Task:
    return Task(
        f"{which}_number",
        NUMBER,
        "You are given a list of different numbers. "
        f"Compare them and write the {which} number of the list.",
        listing(3, 5, UP),
        lambda f: pick(f.words, key=int),
        word(0),
        f"{{out}} is the {which} number.",
        f"{{wrong}} is not the {which} number.",
    )


def who_has_the(which: str, best: str, worst: str) -> Task:
    return Task(
        f"who_has_the_{which}",
        QA,
        "Compare the numbers in the story. Write the name of the person who has the "
        f"{which} things.",
        counts,
        lambda f: vars(f)[best],
        lambda f: vars(f)[worst],
        f"{{out}} has the {which} {{things}}.",
        f"{{wrong}} does not have the {which} {{things}}.",
    )


def place_of_trip(which: str, wrong: str) -> Task:
    return Task(
        f"{which}_place_of_the_trip",
        EXTRACT,
        f"The story tells to which places a person went. Write the {which} place.",
        trip,
        lambda f: [vars(f)[which], "the " + vars(f)[which]],
        lambda f: vars(f)[wrong],
        f"The {{out}} was the {which} place.",
        f"The {{wrong}} was the {wrong} place.",
    )


def it_was(key: str, part: str, begin: str, join: str, rest: str) -> Task:
    def answer(f: Facts) -> str:
        who = "" if join == "who" else f"{f.who} "
        return f"{begin} {vars(f)[key]} {join} {who}{f.deed}."

    return Task(
        f"it_was_the_{part}",
        REWRITE,
        f"Rewrite the sentence so that it begins with '{begin}', then names the {part}, and goes "
        f"on with '{join}'. Leave out {rest}.",
        event,
        answer,
        text,
        f"The sentence names the {part} first.",
        f"It does not begin with '{begin}'.",
    )


def what_was(mood: str, other: str, definition: str) -> Task:
    return Task(
        f"what_was_{mood}",
        SENTIMENT,
        definition,
        review,
        lambda f: [vars(f)[mood], "the " + vars(f)[mood]] if f.mood == "mixed" else None,
        lambda f: vars(f)[other],
        f"The {{out}} was {mood}.",
        f"The {{wrong}} was {other}.",
    )


# ---------------------------------------------------------------------------------------- the tasks

PRETRAIN = [
    nth_word("first", 0),
    nth_word("third", 2),
    Task(
        "word_before_the_last",
        LIST,
        "The input is a list of words. Your answer is the one word that stands right before the "
        "last word.",
        adjectives(4),
        word(-2),
        word(-1),
        "Only one word comes after '{out}'.",
        "'{wrong}' is the last word.",
    ),
    Task(
        "first_two_words",
        LIST,
        "Given a list of words, write the first and the second word, separated by a comma. Keep "
        "their order and leave all the other words out.",
        mixed,
        lambda f: comma(f.words[:2]),
        lambda f: comma(f.words[1::-1]),
        "The list begins with {out}.",
        "The two words are in the wrong order.",
    ),
    Task(
        "last_two_words",
        LIST,
        "The input is a list of words. Your answer is the last two words of the list in the same "
        "order, separated by a comma.",
        adjectives(5),
        lambda f: comma(f.words[-2:]),
        word(-1),
        "The list ends with {out}.",
        "One word is missing.",
    ),
    Task(
        "move_first_word_to_the_end",
        LIST,
        "You are given a list of words. Move the first word to the end of the list and write the "
        "whole new list, separated by commas.",
        mixed,
        lambda f: comma(f.words[1:] + f.words[:1]),
        lambda f: comma(f.words[1:]),
        "'{words[0]}' has moved from the start to the end.",
        "'{words[0]}' has been lost.",
    ),
    Task(
        "word_after_the_colour",
        LIST,
        "Exactly one word of the given list is a colour. Find it and write the word that comes "
        "right after it.",
        mixed,
        after("colour"),
        lambda f: of(f, "colour")[0],
        "'{out}' follows the colour.",
        "'{wrong}' is the colour itself.",
    ),
    Task(
        "remove_the_tools",
        LIST,
        "Some words of the list are tools. Leave out every tool and write all the other words in "
        "the same order, separated by commas.",
        mixed,
        lambda f: comma([w for w in f.words if CLASS_OF[w] != "tool"]) if of(f, "tool") else None,
        lambda f: comma(of(f, "tool")),
        "No tool is left.",
        "These are the tools themselves.",
    ),
    find_the("animal"),
    find_the("city"),
    find_the("month"),
    all_of("colour"),
    all_of("fruit"),
    Task(
        "count_words_of_list",
        NUMBER,
        "How many words are there in the list? Count them and answer with a number.",
        lambda rng: mixed(rng, 3, 6),
        lambda f: str(len(f.words)),
        None,
        "There are {out} words.",
        "The list does not have {wrong} words.",
        ("3", "4", "5", "6"),
    ),
    Task(
        "list_contains_a_vehicle",
        VERIFY,
        "Does the list contain a vehicle? Answer 'Yes' if at least one word is a vehicle, and "
        "'No' if there is none.",
        mixed,
        lambda f: yes(bool(of(f, "vehicle"))),
        None,
        {"Yes": "A word of the list is a vehicle.", "No": "No word of the list is a vehicle."},
        {"Yes": "There is a vehicle in the list.", "No": "There is no vehicle in the list."},
        YES_NO,
    ),
    Task(
        "class_of_three_words",
        WORD,
        f"All three words of the list belong to the same class. Write the name of the class: "
        f"{comma([*CLASSES][:-1])} or job.",
        one_class,
        lambda f: CLASS_OF[f.words[0]],
        None,
        "All the words belong to the class '{out}'.",
        "None of the words belongs to the class '{wrong}'.",
        tuple(CLASSES),
    ),
    of_each("verb", "past form", PAST, [*PAST], 2),
    of_each("city", "country", COUNTRY, [*COUNTRY], 2),
    of_each("number", "name", NUMBER_NAME, [*NUMBER_NAME], 2),
    Task(
        "say_the_opposite",
        REWRITE,
        "Rewrite the sentence so that it says the opposite. Put the opposite of the adjective in "
        "its place and keep all the other words.",
        phrase("The {thing} is {adj}."),
        lambda f: f"The {f.thing} is {OPPOSITE[f.adj]}.",
        text,
        "The opposite of '{adj}' was put in.",
        "The adjective is still the same.",
    ),
    Task(
        "one_becomes_many",
        REWRITE,
        "The input speaks of one thing. Rewrite it so that it speaks of many: 'one' becomes "
        "'many', and the noun takes its plural form.",
        phrase("one {adj} {thing}"),
        lambda f: f"many {f.adj} {plural(f.thing)}",
        lambda f: f"many {f.adj} {f.thing}",
        "The noun is in the plural.",
        "The noun is not in the plural.",
    ),
    Task(
        "the_young_animal",
        REWRITE,
        "Rewrite the sentence. In the place of the animal put the name of its young, as a kitten "
        "is the young of a cat. Keep the other words.",
        phrase("{who} has the {animal}."),
        lambda f: f"{f.who} has the {f.young}.",
        text,
        "The {young} is the young of the {animal}.",
        "The animal is still the same.",
    ),
    Task(
        "place_of_work",
        QA,
        "The sentence says what a person is, that is the job of the person. Answer at which place "
        "this person works.",
        phrase("{who} is the {job}."),
        lambda f: [f.place, "the " + f.place],
        lambda f: f.job,
        "The {job} works there.",
        "This is the job and not the place.",
    ),
    extreme_number("smallest", min),
    Task(
        "first_number_larger",
        NUMBER,
        "Compare the first number of the list with the last one. Answer 'Yes' if the first is "
        "larger than the last, else 'No'.",
        listing(3, 5, UP),
        lambda f: yes(int(f.words[0]) > int(f.words[-1])),
        None,
        {
            "Yes": "{words[0]} is larger than the last one.",
            "No": "{words[0]} is smaller than the last one.",
        },
        {"Yes": "The first number is larger.", "No": "The first number is not larger."},
        YES_NO,
    ),
    Task(
        "how_many_together",
        NUMBER,
        "Two people have some things. Add the two numbers and write how many things they have "
        "together.",
        both,
        lambda f: str(f.more + f.less),
        lambda f: str(f.more),
        "{more} and {less} are {out} together.",
        "The {things} of {other} were left out.",
    ),
    Task(
        "next_number",
        COMPLETE,
        "The numbers of the list go up or down in steps of one. Write the number that comes next.",
        sequence(UP, UP[::-1]),
        lambda f: f.following,
        lambda f: f.last,
        "{out} comes after {last}.",
        "{wrong} is already in the list.",
    ),
    Task(
        "who_did_it",
        EXTRACT,
        "Read the sentence about a person. Write only the name of the person.",
        event,
        lambda f: f.who,
        lambda f: f.job,
        "The sentence is about {out}.",
        "This is the job and not the name.",
    ),
    Task(
        "where_it_was",
        EXTRACT,
        "The sentence tells what a person did. Find out in which city it was and write the city.",
        event,
        lambda f: f.city,
        lambda f: f.day,
        "It was in {out}.",
        "This is the day and not the city.",
    ),
    Task(
        "verb_of_the_sentence",
        EXTRACT,
        "Write the verb of the sentence, that is the word which says what the person did.",
        event,
        lambda f: f.past,
        lambda f: f.job,
        "'{out}' says what {who} did.",
        "'{wrong}' is not a verb.",
    ),
    Task(
        "begin_with_the_day",
        REWRITE,
        "Rewrite the sentence so that it begins with the day, then tells who did what, and ends "
        "with the city. Do not change or lose a word.",
        event,
        lambda f: None if f.text.startswith("On") else f"On {f.day}, {f.core} in {f.city}.",
        text,
        "The sentence now begins with the day.",
        "The sentence is still the same.",
    ),
    it_was("who", "person", "It was", "who", "the job, the city and the day"),
    Task(
        "title_with_thing_and_city",
        TITLE,
        "Write a short title for the sentence. The title names the thing, with its adjective, and "
        "the city.",
        event,
        lambda f: [f"{x[0].upper()}{x[1:]} in {f.city}" for x in articles(f.adj, f.thing)],
        lambda f: f"{f.who} in {f.city}",
        "The title names the thing and the city.",
        "The thing is missing.",
    ),
    Task(
        "ask_who",
        QUESTION,
        "Write a question about the sentence. The question begins with 'Who' and the answer to it "
        "is the name of the person.",
        event,
        lambda f: [f"Who {f.past} {x}?" for x in articles(f.adj, f.thing)[:0:-1]],
        lambda f: f"{f.who} {f.deed}.",
        "The answer is {who}.",
        "This is not a question.",
    ),
    Task(
        "who_has_the_thing",
        QA,
        "Read the story and answer the question about it with the name of a person.",
        asking(owners, "Who has the {thing}?"),
        lambda f: f.who,
        lambda f: f.other,
        "{who} has the {thing}.",
        "{wrong} has the {other_thing}.",
    ),
    Task(
        "colour_of_the_thing",
        QA,
        "Read the story about people and their things. Answer the question with the name of a "
        "colour.",
        asking(owners, "What colour is the {thing}?"),
        lambda f: f.colour,
        lambda f: f.other_colour,
        "The {thing} is {out}.",
        "The {other_thing} is {wrong}.",
    ),
    Task(
        "how_many_has_the_person",
        QA,
        "The story tells how many things some people have. Answer the question with a number.",
        asking(counts, "How many {things} does {asked} have?"),
        lambda f: str(f.amount),
        lambda f: str(f.another),
        "{asked} has {out} {things}.",
        "Another person has {wrong} {things}.",
    ),
    who_has_the("fewest", "least", "most"),
    place_of_trip("first", "last"),
    Task(
        "was_the_place_visited",
        VERIFY,
        "Read the story and answer the question. Answer 'Yes' if the person went to this place "
        "and 'No' if the story does not say so.",
        asking(trip, "Was {who} at the {asked}?"),
        lambda f: yes(f.asked in f.places),
        None,
        {"Yes": "The story names the {asked}.", "No": "The story does not name the {asked}."},
        {"Yes": "{who} went to the {asked}.", "No": "The {asked} is not in the story."},
        YES_NO,
    ),
    Task(
        "positive_or_negative",
        SENTIMENT,
        "The text speaks of two things. Write 'positive' if both of them were good and 'negative' "
        "if both were bad.",
        review,
        lambda f: f.mood,
        None,
        {"positive": "Both were good.", "negative": "Both were bad."},
        {"positive": "Nothing was bad.", "negative": "Nothing was good."},
        ("positive", "negative"),
    ),
    Task(
        "what_it_speaks_of",
        EXTRACT,
        "The text says how good or bad two things were. Write the names of the two things, "
        "separated by a comma, in any order.",
        review,
        lambda f: [f"{f.first}, {f.second}", f"{f.second}, {f.first}"],
        lambda f: f.first,
        "The text speaks of the {first} and the {second}.",
        "The {second} is missing.",
    ),
    Task(
        "card_with_colour_and_thing",
        DATA,
        "The input is a card with a name, a colour and a thing. Write a sentence which says that "
        "the person has the thing in this colour.",
        card("name", "colour", "thing"),
        lambda f: f"{f.name} has {a(f.colour)} {f.thing}.",
        lambda f: f"{f.name} has {a(f.thing)}.",
        "The sentence uses the whole card.",
        "The colour is missing.",
    ),
]

TRAIN = [
    nth_word("second", 1),
    nth_word("last", -1),
    Task(
        "all_but_the_first",
        LIST,
        "Given a list of words, leave out the first word and write all the other words in the "
        "same order, separated by commas.",
        mixed,
        lambda f: comma(f.words[1:]),
        lambda f: comma(f.words[:-1]),
        "Only '{words[0]}' was left out.",
        "The last word was left out and not the first.",
    ),
    find_the("vehicle"),
    all_of("animal"),
    Task(
        "odd_one_out",
        RELATION,
        "In the list three words belong to the same class, and one word does not. Write the one "
        "word that does not belong to the others.",
        lambda rng: one_class(rng, 1),
        lambda f: next(w for w in f.words if len(of(f, CLASS_OF[w])) == 1),
        word(0),
        "'{out}' is of another class than the others.",
        "'{wrong}' is of the same class as two other words.",
    ),
    Task(
        "contains_opposites",
        RELATION,
        "You are given three adjectives. Answer 'Yes' if one of them is the opposite of another "
        "one, else 'No'.",
        adjectives(3),
        lambda f: yes(opposed(f)),
        None,
        {"Yes": "Two of the words are opposites.", "No": "No two of the words are opposites."},
        {"Yes": "There are two opposites.", "No": "There are no opposites."},
        YES_NO,
    ),
    count_of(
        "fruit",
        "How many fruits are there in the list? Count only the words that are fruits and answer "
        "with a number.",
    ),
    of_each("adjective", "opposite", OPPOSITE, [*OPPOSITE], 1),
    of_each("noun", "plural form", {noun: plural(noun) for noun in NOUNS}, NOUNS, 1),
    Task(
        "job_of_the_person",
        REWRITE,
        "The sentence says at which place a person works. Rewrite it so that it says what the "
        "person is, that is the job of the person.",
        phrase("{who} works at the {place}."),
        lambda f: [f"{f.who} is the {f.job}.", f"{f.who} is {a(f.job)}."],
        text,
        "The {job} works there.",
        "This does not name the job.",
    ),
    Task(
        "country_of_the_event",
        QA,
        "The sentence names a city but not the country. Answer in which country the person was.",
        event,
        lambda f: [COUNTRY[f.city], "in " + COUNTRY[f.city]],
        lambda f: f.city,
        "{city} is in {out}.",
        "This is the city and not the country.",
    ),
    extreme_number("largest", max),
    Task(
        "how_many_more",
        NUMBER,
        "Two people have some things. Write how many more things the first person has than the "
        "second person.",
        both,
        lambda f: str(f.more - f.less),
        lambda f: str(f.more + f.less),
        "{less} and {out} are {more} together.",
        "The numbers were added.",
    ),
    Task(
        "what_comes_next",
        COMPLETE,
        "The list goes on in the same order: days, months, or numbers in steps of two or ten. "
        "Write what comes next.",
        sequence(*[DAYS * 2, MONTHS * 2, UP[::2]] * 4, *(UP[i::10] for i in range(10))),
        lambda f: f.following,
        lambda f: f.last,
        "{out} comes after {last}.",
        "{wrong} is already in the list.",
    ),
    Task(
        "job_in_the_sentence",
        EXTRACT,
        "Read the sentence about a person. Write only the job of the person.",
        event,
        lambda f: [f.job, "the " + f.job],
        lambda f: f.who,
        "{who} is the {out}.",
        "This is the name.",
    ),
    Task(
        "thing_with_adjective",
        EXTRACT,
        "The sentence tells what a person did with a thing. Write the thing together with its "
        "adjective.",
        event,
        lambda f: articles(f.adj, f.thing),
        lambda f: f.thing,
        "This is what {who} {past}.",
        "The adjective is missing.",
    ),
    it_was("day", "day", "It was on", "that", "the job and the city"),
    Task(
        "title_with_person_and_thing",
        TITLE,
        "Write a short title for the sentence. The title names the person and the thing, with "
        "'and' between them.",
        event,
        lambda f: [f"{f.who} and {x}" for x in (f"the {f.thing}", *articles(f.adj, f.thing)[1:])],
        lambda f: f"{f.who} in {f.city}",
        "The title names {who} and the {thing}.",
        "The thing is missing.",
    ),
    Task(
        "ask_when",
        QUESTION,
        "Write a question about the sentence. The question begins with 'When did' and the answer "
        "to it is the day.",
        event,
        lambda f: [f"When did {f.who} {f.base} {x}?" for x in articles(f.adj, f.thing)[:0:-1]],
        lambda f: f"When did {f.who} {f.deed}?",
        "The answer is {day}.",
        "'did' must not go with the past form.",
    ),
    Task(
        "what_has_the_person",
        QA,
        "Read the story and answer the question about it with the name of a thing.",
        asking(owners, "What does {who} have?"),
        lambda f: [*articles(f.thing)[:2], *articles(f.colour, f.thing)[:2]],
        lambda f: f.other_thing,
        "{who} has the {thing}.",
        "{other} has the {other_thing}.",
    ),
    Task(
        "has_the_person_the_thing",
        VERIFY,
        "Read the story and answer the question. Answer 'Yes' if the person has this thing, and "
        "'No' if another person has it.",
        asking(owners, "Does {who} have the {claimed}?"),
        lambda f: yes(f.claimed == f.thing),
        None,
        {"Yes": "{who} has the {thing}.", "No": "{other} has the {claimed}."},
        {"Yes": "The story says that {who} has it.", "No": "{who} does not have the {claimed}."},
        YES_NO,
    ),
    Task(
        "question_has_an_answer",
        ANSWERABLE,
        "Is there an answer to the question in the story? Write 'Yes' if the story names the "
        "person of the question, and 'No' if it does not.",
        asking(owners, "What does {asked} have?"),
        lambda f: yes(f.asked == f.who),
        None,
        {"Yes": "The story says what {asked} has.", "No": "The story does not name {asked}."},
        {"Yes": "{asked} is in the story.", "No": "{asked} is not in the story."},
        YES_NO,
    ),
    who_has_the("most", "most", "least"),
    place_of_trip("last", "first"),
    what_was(
        "good",
        "bad",
        "The text speaks of two things. One of them was good and the other one was bad. Write "
        "only the thing that was good.",
    ),
    Task(
        "positive_negative_or_mixed",
        SENTIMENT,
        "The text speaks of two things. Write 'positive' if both of them were good, 'negative' if "
        "both were bad, and 'mixed' if only one was good.",
        review,
        lambda f: f.mood,
        None,
        {
            "positive": "Both were good.",
            "negative": "Both were bad.",
            "mixed": "Only one was good.",
        },
        {
            "positive": "Nothing was bad.",
            "negative": "Nothing was good.",
            "mixed": "One was bad, one good.",
        },
        ("positive", "negative", "mixed"),
    ),
    Task(
        "card_with_job_and_city",
        DATA,
        "The input is a card with a name, a job and a city. Write a sentence which says what the "
        "person is and in which city.",
        card("name", "job", "city"),
        lambda f: [f"{f.name} is {a(f.job)} in {f.city}.", f"In {f.city}, {f.name} is {a(f.job)}."],
        lambda f: f"{f.name} is {a(f.job)}.",
        "The sentence uses the whole card.",
        "The city is missing.",
    ),
]

# Above each task: the TRAIN tasks that teach its parts.
TEST = [
    # second_word_of_list + opposite_of_each_adjective
    Task(
        "opposite_of_second_word",
        WORD,
        "You are given adjectives separated by commas. Write the opposite of the second adjective "
        "and nothing else.",
        listing(3, 4, [*OPPOSITE]),
        lambda f: OPPOSITE[f.words[1]],
        word(1),
        "'{words[1]}' is the second word, and '{out}' is its opposite.",
        "This is the second word itself.",
    ),
    # last_word_of_list + plural_form_of_each_noun
    Task(
        "plural_of_last_word",
        WORD,
        "You are given nouns separated by commas. Write the plural form of the last noun and "
        "nothing else.",
        listing(3, 4, NOUNS),
        lambda f: plural(f.words[-1]),
        word(-1),
        "'{out}' is the plural of the last word.",
        "This is the last word, but not in the plural.",
    ),
    # last_word_of_list + all_animals_of_list
    Task(
        "last_animal_of_list",
        LIST,
        "Some words of the given list are animals. Write only the last animal of the list.",
        mixed,
        lambda f: of(f, "animal")[-1] if len(of(f, "animal")) > 1 else None,
        lambda f: of(f, "animal")[0],
        "No other animal comes after '{out}'.",
        "'{wrong}' is not the last animal.",
    ),
    # all_but_the_first + opposite_of_each_adjective
    Task(
        "opposites_of_all_but_the_first",
        LIST,
        "Given a list of adjectives, leave out the first word and write the opposite of each of "
        "the other words, in the same order, separated by commas.",
        listing(3, 3, [*OPPOSITE]),
        lambda f: comma([OPPOSITE[w] for w in f.words[1:]]),
        lambda f: comma(f.words[1:]),
        "These are the opposites of the second and the third word.",
        "These words are not the opposites.",
    ),
    # second_word_of_list + last_word_of_list + contains_opposites
    Task(
        "second_and_last_are_opposites",
        RELATION,
        "You are given four adjectives. Answer 'Yes' if the last word is the opposite of the "
        "second word, else 'No'.",
        adjectives(4),
        lambda f: yes(OPPOSITE[f.words[1]] == f.words[3]) if opposed(f) else None,
        None,
        {
            "Yes": "'{words[3]}' is the opposite of '{words[1]}'.",
            "No": "'{words[3]}' is not the opposite of '{words[1]}'.",
        },
        {"Yes": "The two words are opposites.", "No": "The two words are no opposites."},
        YES_NO,
    ),
    # count_the_fruits + all_animals_of_list
    count_of(
        "animal",
        "Count only the words of the list that are animals. Answer with the number of animals in "
        "the list.",
    ),
    # largest_number + who_has_the_most
    Task(
        "the_most_things",
        NUMBER,
        "Compare the numbers in the story. Write how many things the person has who has the most.",
        counts,
        lambda f: str(f.largest),
        lambda f: f.most,
        "{most} has the most, that is {out}.",
        "This is the name and not the number.",
    ),
    # thing_with_adjective + opposite_of_each_adjective
    Task(
        "opposite_of_the_adjective",
        EXTRACT,
        "The sentence tells what a person did with a thing. Write the opposite of the adjective "
        "of the thing.",
        event,
        lambda f: OPPOSITE[f.adj],
        lambda f: f.adj,
        "The {thing} is {adj}, and '{out}' is the opposite.",
        "This is the adjective itself.",
    ),
    # last_place_of_the_trip + job_of_the_person
    Task(
        "job_at_the_last_place",
        QA,
        "The story tells to which places a person went. Answer which job a person has who works "
        "at the last place.",
        trip,
        lambda f: articles(WORKER[f.last]),
        lambda f: WORKER[f.first],
        "The {out} works at the last place.",
        "The {wrong} works at the first place.",
    ),
    what_was(
        "bad",
        "good",
        "The text speaks of two things. Exactly one of them was bad. Answer which one it was.",
    ),
    # job_in_the_sentence + title_with_person_and_thing
    Task(
        "title_with_job_and_thing",
        TITLE,
        "Write a short title for the sentence. The title names the job of the person and the "
        "thing, with 'and' between them, but not the person.",
        event,
        lambda f: [
            f"The {f.job} and {x}" for x in (f"the {f.thing}", *articles(f.adj, f.thing)[1:])
        ],
        lambda f: f"{f.who} and the {f.thing}",
        "The title names the {job} and the {thing}.",
        "The title names the person.",
    ),
    # it_was_the_day + country_of_the_event
    it_was("city", "city", "It was in", "that", "the job and the day"),
]

# --------------------------------------------------------------------------------- rendering to SNI

# First number, tasks, number of their instances.
GROUPS = [
    (1, PRETRAIN, 300),
    (101, TRAIN, 140),
    (201, TEST, 100),
]
NAMED = []  # of each group: its tasks by their names
for _first, _group, _ in GROUPS:
    NAMED.append({f"task{n:03d}_{task.name}": task for n, task in enumerate(_group, _first)})


class Item(NamedTuple):
    facts: Facts
    output: list[str]
    wrong: str


def draw_item(task: Task, rng: Random) -> Item | None:
    """Draw one item. Return None if the facts do not suit the task."""
    facts = task.source(rng)
    answer = task.answer(facts)
    output = [answer] if isinstance(answer, str) else answer
    if not output or (task.labels and output[0] not in task.labels):
        return None
    if task.wrong:
        wrong = task.wrong(facts)
    else:
        wrong = rng.choice([label for label in task.labels if label != output[0]])
    return Item(facts, output, wrong)


def draw_items(
    task: Task,
    rng: Random,
    count: int,
    seen: set[str],
    *,
    most: int,
    fail: bool = False,
    least: int | None = None,
) -> list[Item]:
    """Draw `count` items with inputs that are not in `seen`.

    most: how often one first reference may occur, which balances the labels. fail: leave out items
    whose typical mistake is right by chance. least: with so many items, fewer than `count` are
    enough.
    """
    items: list[Item] = []
    times: Counter[str] = Counter()
    for _ in range(100_000):
        item = draw_item(task, rng)
        if not item or item.facts.text in seen or times[item.output[0]] == most:
            continue
        if fail and item.wrong in item.output:
            continue
        seen.add(item.facts.text)
        times[item.output[0]] += 1
        items.append(item)
        if len(items) == count:
            return items
    if least and len(items) >= least:
        return items
    raise ValueError(f"{task.name}: only {len(items)} of {count} different inputs")


def example(item: Item, output: str, why: str | dict[str, str]) -> dict[str, str]:
    """Return a positive or negative example with its explanation."""
    if isinstance(why, dict):
        why = why[item.output[0]]
    explanation = why.format(out=item.output[0], wrong=item.wrong, **vars(item.facts))
    explanation = explanation[0].upper() + explanation[1:]
    return {"input": item.facts.text, "output": output, "explanation": explanation}


def render(name: str, task: Task, size: int) -> str:
    """Return a task file as the official ones are written.

    The examples differ in their outputs. They are none of the instances.
    """
    rng = Random(name)
    seen: set[str] = set()
    right = draw_items(task, rng, min(4, len(task.labels) or 3), seen, most=1)
    wrong = draw_items(task, rng, 2, seen, most=1, fail=True)
    most = math.ceil(size / max(1, len(task.labels)))
    items = draw_items(task, rng, size, seen, most=most, least=300)

    def instance(item: Item) -> dict[str, str | list[str]]:
        digits = hashlib.md5(f"{name} {item.facts.text}".encode()).hexdigest()
        return {"id": f"{name[:7]}-{digits}", "input": item.facts.text, "output": item.output}

    return json.dumps(
        {
            "Contributors": ["the authors of this repository"],
            "Source": ["make_sni.py"],
            "URL": ["sni/make_sni.py"],
            "Categories": [task.category],
            "Reasoning": [],
            "Definition": [task.definition],
            "Input_language": ["English"],
            "Output_language": ["English"],
            "Instruction_language": ["English"],
            "Domains": ["Made up"],
            "Positive Examples": [example(item, item.output[0], task.why) for item in right],
            "Negative Examples": [example(item, item.wrong, task.why_not) for item in wrong],
            "Instances": [instance(item) for item in items],
            "Instance License": ["as this repository"],
        },
        indent=4,
        ensure_ascii=False,
    )


def all_files() -> dict[str, str]:
    """Return the content of all files by their paths below this folder."""
    files = {}
    for named, (_, _, size) in zip(NAMED, GROUPS, strict=True):
        for name, task in named.items():
            files[f"tasks/{name}.json"] = render(name, task, size)

    base, train, test = map(list, NAMED)
    lists = {
        "default/train": train,
        "default/test": test,
        "default/excluded": base,
        "pretrain/train": base,
        "pretrain/test": [],
        "pretrain/excluded": train + test,
    }
    for key, names in lists.items():
        files[f"splits/{key}_tasks.txt"] = "".join(f"{name}\n" for name in names)
    files["own.jsonl"] = own_rows([files[f"tasks/{name}.json"] for name in train])
    return files


def own_rows(task_files: list[str]) -> str:
    """Return an example of a user's own data: the last 8 instances of each task, mixed."""
    rows = []
    for task in map(json.loads, task_files):
        for instance in task["Instances"][-8:]:
            output = instance["output"]
            if len(output) == 1:
                output = output[0]
            row = {"instruction": task["Definition"][0], "input": instance["input"]}
            rows.append(json.dumps(row | {"output": output}) + "\n")
    Random("own").shuffle(rows)
    return "".join(rows)


def differences(folder: Path = HERE) -> list[str]:
    """Return the paths that are missing, different or too many on disk."""
    expected = {path: content.encode() for path, content in all_files().items()}
    found = {}
    for pattern in ("tasks/**/*.*", "splits/**/*.*", "*.jsonl"):
        for path in folder.glob(pattern):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return sorted({path for path, _ in expected.items() ^ found.items()})


# --------------------------------------------------------------------------------------------- main


def write(folder: Path = HERE) -> None:
    """Write all files, and remove other task files."""
    for path in (folder / "tasks").glob("*.json"):
        path.unlink()
    for name, content in all_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode())


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="compare the files on disk with these")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to or to compare")
    args = parser.parse_args()
    if args.check:
        different = differences(args.out)
        print("\n".join(different) or "nothing differs")
        sys.exit(bool(different))
    for name in ("tasks", "splits", "own.jsonl"):
        if args.out != HERE and (args.out / name).exists():
            parser.error(f"{args.out / name}: exists, and nothing is overwritten")
    write(args.out)


if __name__ == "__main__":
    main()
