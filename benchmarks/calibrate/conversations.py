"""Chat-shaped examples for the shipped calibration text: own writing, put together by templates.

Every topic is asked about in several ways (explanation, list, for a child, correction, a
dialogue of several turns, a plan, a comparison of right and wrong, JSON), so that the examples
cover the shapes of answers that people want. Refusals and plain tasks are among them.
"""

from __future__ import annotations

import json
import random

from topics import REFUSALS, TOPICS

Message = dict[str, str]


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _explanation(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, example, mistake = topic
    ask = rng.choice(
        (
            f"What is {name}?",
            f"Can you explain {name} to me?",
            f"Please explain {name} in a short paragraph.",
            f"I keep hearing about {name}. What does it mean?",
        )
    )
    a, b, c, d = points
    return [_user(ask), _reply(
        f"{_cap(name)} is {what}. In short, {a}. Then {b}. Besides, {c}, and {d}.\n\n"
        f"An example from everyday life: {example}. A common mistake is {mistake}.")]  # fmt: skip


def _list(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, _, _ = topic
    count = rng.choice((3, 4))
    order = list(points)[:count]
    marks = [f"{i}. " for i in range(1, 5)] if rng.random() < 0.5 else ["- "] * 4
    ask = rng.choice(
        (
            f"List {count} key points about {name}.",
            f"Give me {count} bullet points on {name}, one sentence each.",
            f"Name {count} things everyone should know about {name}.",
        )
    )
    body = "\n".join(f"{mark}{_cap(point)}." for mark, point in zip(marks, order, strict=False))
    return [_user(ask), _reply(f"{_cap(name)} is {what}. The main points:\n\n{body}")]


def _for_a_child(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, example, _ = topic
    age = rng.choice((8, 9, 10, 11))
    return [_user(f"Explain {name} to a {age}-year-old."), _reply(
        f"Imagine this: {example}. That has to do with {name}, which is {what}.\n\n"
        f"It goes like this. First, {points[0]}. After that, {points[1]}. "
        "You can try to spot it yourself the next time you are out, and tell someone what you saw.")]  # fmt: skip


def _correction(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, example, mistake = topic
    ask = rng.choice(
        (
            f"What do people often get wrong about {name}?",
            f"Is there a typical misunderstanding about {name}?",
        )
    )
    return [_user(ask), _reply(
        f"Yes. A common mistake is {mistake}.\n\nIt helps to remember what {name} is: {what}. "
        f"Two facts make the difference clear: {points[2]}, and {points[3]}. "
        f"If you want to test your understanding, think about this case: {example}.")]  # fmt: skip


def _dialogue(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, example, mistake = topic
    # No system message: some chat templates refuse the role, and this text must fit every model.
    return [
        _user(f"I have to give a talk about {name} tomorrow. Where do I start?"),
        _reply(f"Start with one sentence that says what it is: {_cap(name)} is {what}. Then show a case your listeners know, for instance that {example}."),
        _user(rng.choice(("Good. And what should the middle part contain?", "That helps. What comes next?", "And then?"))),
        _reply(f"Three points are enough for a short talk:\n\n1. {_cap(points[0])}.\n2. {_cap(points[1])}.\n3. {_cap(points[2])}.\n\nSpend about two minutes on each."),
        _user("How could I end it?"),
        _reply(f"End with something people remember. You could mention a typical error, namely {mistake}, and then close with your last fact: {points[3]}."),
    ]  # fmt: skip


def _json(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, example, _ = topic
    value = {
        "topic": name,
        "definition": what,
        "facts": [_cap(p) for p in points[: rng.choice((2, 3))]],
        "example": _cap(example),
    }
    return [_user(f"Describe {name} as a JSON object with the keys topic, definition, facts and example. Answer with JSON only."),
            _reply(json.dumps(value, indent=2, ensure_ascii=False))]  # fmt: skip


def _quiz(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, example, mistake = topic
    ask = rng.choice(
        (
            f"Write three exam questions about {name} with model answers.",
            f"Make a small quiz on {name} and give the solutions.",
        )
    )
    return [_user(ask), _reply(
        f"**Question 1.** What is {name}?\n*Answer:* It is {what}.\n\n"
        f"**Question 2.** State two facts about it.\n*Answer:* {_cap(points[1])}; {points[3]}.\n\n"
        f"**Question 3.** Which error is frequent, and which example speaks against it?\n*Answer:* The error is {mistake}. It may help to consider that {example}.")]  # fmt: skip


def _mail(rng: random.Random, topic: tuple) -> list[Message]:
    name, what, points, _, _ = topic
    who = rng.choice(("Ms Okafor", "Mr Lindqvist", "Dr Haddad", "Professor Sato"))
    day = rng.choice(("Monday", "Tuesday", "Thursday", "Friday"))
    return [_user(f"Write a short and polite email to {who} asking for a meeting on {day} to discuss our lesson about {name}."), _reply(
        f"Subject: Meeting on {day} about our lesson\n\nDear {who},\n\nI am preparing our lesson about {name}, that is, {what}. "
        f"I would like to show that {points[0]}, and I am not sure how deeply we should go into the rest. "
        f"Would you have half an hour for me on {day}? Any time that suits you is fine with me.\n\nThank you and kind regards")]  # fmt: skip


FORMS = (_explanation, _list, _for_a_child, _correction, _dialogue, _json, _quiz, _mail)


def records() -> list[dict]:
    """Return all conversations: forms in turn over all topics, refusals spread among them."""
    made: list[dict] = []
    for number, form in enumerate(FORMS):
        for place, topic in enumerate(TOPICS):
            rng = random.Random(f"{form.__name__}-{topic[0]}")
            made.append({"domain": "chat", "messages": form(rng, topic)})
            if place % len(FORMS) == number and place // len(FORMS) * len(FORMS) + number < len(REFUSALS):
                ask, no, instead = REFUSALS[place // len(FORMS) * len(FORMS) + number]
                made.append({"domain": "chat", "prompt": ask, "response": f"{no} {instead}"})
    return made
