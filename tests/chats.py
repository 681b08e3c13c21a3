"""Conversations that chat templates are tried on: ordinary ones, and one for each way a template or its data can surprise."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
Chat = dict[str, Any]  # messages, and tools where there are some

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look the weather up.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def call(city: str, number: int = 1) -> dict[str, Any]:
    return {
        "type": "function",
        "id": f"abcdefgh{number}",
        "function": {"name": "get_weather", "arguments": {"city": city}},
    }


def result(text: str, number: int = 1) -> Message:
    return {"role": "tool", "name": "get_weather", "content": text, "tool_call_id": f"abcdefgh{number}"}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


ASKS = user("What is the weather like in Oslo?")

CHATS: dict[str, Chat] = {
    "one turn": {"messages": [user("Name a colour."), bot("Red, of course.")]},
    "many turns": {
        "messages": [
            user("Name a colour."), bot("Red, of course."),
            user("Another one?"), bot("Green then.\n\nOr olive."),
            user("And a third"), bot("Blue"),
            user("Enough."), bot("Very well!"),
        ]
    },
    "same words": {"messages": [user("Yes"), bot("Yes"), user("Yes"), bot("Yes"), user("assistant"), bot("user")]},
    "system": {"messages": [system("Speak briefly."), user("Name a colour."), bot("Red."), user("Another?"), bot("Green.")]},
    "two systems": {"messages": [system("Speak briefly."), system("Be kind."), user("Name a colour."), bot("Red.")]},
    "late system": {"messages": [user("Hello"), bot("Good day."), system("Now in French."), user("Hello?"), bot("Bonjour.")]},
    "tools": {
        "messages": [ASKS, bot("", tool_calls=[call("Oslo")]), result("4 degrees, rain"), bot("It rains, at 4 degrees.")],
        "tools": [WEATHER],
    },
    "tools many turns": {
        "messages": [
            system("Use tools."), user("Good morning"), bot("Good morning to you."),
            ASKS, bot("", tool_calls=[call("Oslo")]), result("rain"), bot("It rains."),
            user("And in Rome?"), bot("", tool_calls=[call("Rome")]), result("sun"), bot("The sun shines."),
        ],
        "tools": [WEATHER],
    },
    "spoken tool call": {
        "messages": [ASKS, bot("Let me look.", tool_calls=[call("Oslo")]), result("rain"), bot("It rains.")], "tools": [WEATHER],
    },
    "parallel tool calls": {
        "messages": [
            ASKS, bot("", tool_calls=[call("Oslo", 1), call("Rome", 2)]), result("rain", 1), result("sun", 2), bot("Mixed."),
        ],
        "tools": [WEATHER],
    },
    "last turn calls": {"messages": [ASKS, bot("", tool_calls=[call("Oslo")])], "tools": [WEATHER]},
    "tools unused": {"messages": [user("Name a colour."), bot("Red.")], "tools": [WEATHER]},
    "reasoning": {
        "messages": [
            user("Two and two?"), bot("Four.", reasoning_content="Two pairs make it."),
            user("And three more?"), bot("Seven.", reasoning_content="Count on from there."),
        ]
    },
    "reasoning inside content": {
        "messages": [
            user("Two and two?"), bot("<think>\nTwo pairs make it.\n</think>\n\nFour."),
            user("And three more?"), bot("<think>\nCount on from there.\n</think>\n\nSeven."),
        ]
    },
    "empty answer": {"messages": [user("Say nothing."), bot("")]},
    "empty answer inside": {"messages": [user("Say nothing."), bot(""), user("Thanks."), bot("You are welcome.")]},
    "blank answer": {"messages": [user("Say nothing."), bot(" \n"), user("Thanks."), bot("You are welcome.")]},
    "consecutive assistants": {"messages": [user("Count."), bot("One."), bot("Two."), user("Go on."), bot("Three.")]},
    "consecutive users": {"messages": [user("Hello."), user("Anyone there?"), bot("Yes.")]},
    "assistant first": {"messages": [bot("How can I help?"), user("Name a colour."), bot("Red.")]},
    "user last": {"messages": [user("Name a colour."), bot("Red."), user("Another?")]},
    "only a question": {"messages": [user("Name a colour.")]},
    "edges": {
        "messages": [
            user("  “Größe”? 大小\t"), bot("\n 🙂 Größe: 3 × 4 m²\n\n\n"),
            user("\n\n🤔"), bot("👩‍👩‍👧‍👦"), user("é"), bot("  indented\n    code  "),
        ]
    },
}  # fmt: skip


def quoting(header: str) -> Chat:
    """Return a conversation whose answer shows how a turn begins."""
    return {
        "messages": [
            user("How does a turn begin?"),
            bot(f"With {header} and so on."),
            user("Again?"),
            bot(f"{header}yes"),
        ]
    }


def typing(token: str) -> Chat:
    """Return a conversation in which someone types the token that ends turns."""
    return {
        "messages": [
            user(f"What does {token} mean? {token}"), bot("It ends a turn."),
            user(token), bot(f"It is {token} again, said {token} here."),
        ]
    }  # fmt: skip
