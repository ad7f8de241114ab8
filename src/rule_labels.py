"""Labels of latents without a language model: the rule that best tells active tokens from others.

A rule is a disjunction of a few conditions on a token and its neighbours. It is chosen on the
contexts that are shown, and it can be tested on others, because it says which tokens it means.
Works without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from src.contexts import CLOSE, OPEN

BY_RULE_MARK = "[by rule]"  # begins the explanations
NO_RULE = "no rule found"  # follows it where no rule holds
EXPLANATION_CHARS = 1000
# Bounds of the cost: what lies beyond them is not read.
MAX_CONTEXTS = 40
REACH = 32  # tokens on each side of the active one
TOKEN_CHARS = 40
TEXT_CHARS = 400  # on each side of the mark, of a context without tokens

MAX_PARTS = 20  # conditions of a rule
SHOWN_WORDS = 8  # examples in an explanation
PART_COST = 0.02  # gain below which a further condition is not worth its words
WORD_COST = 0.005  # gain below which one more token in a list is not
TEXT_TOKENS = 40  # of a text in a test of detection, about
ALARM_TOKENS = 8  # tokens whose false alarms a condition has to outweigh
WEIGHT_POWER = 0.5  # of an activation, as the weight of a place
MIN_RECALL = 0.4  # of a rule that is called one

Window = tuple[list[str], list[int], list[float]]  # tokens, indices of the active ones, strengths
Condition = tuple[str, str]  # kind, value
Part = frozenset[Condition]  # all of them must hold

# Words of a closed class, by the name under which a label calls them.
GRAMMAR = {
    "first person": "i me my mine myself we us our ours ourselves",
    "second person": "you your yours yourself yourselves thou thee thy thine ye",
    "third person": "he him his himself she her hers herself it its itself they them their "
    "theirs themselves",
    "personal pronouns": "i me we us you thou thee ye he him she her it they them",
    "possessives": "my mine our ours your yours thy thine his her hers its their theirs",
    "reflexive pronouns": "myself yourself himself herself itself ourselves yourselves themselves",
    "modal verbs": "can could may might must shall should will would ought cannot canst shalt wilt",
    "forms of 'be'": "be am is are was were been being art wert",
    "forms of 'have'": "have has had having hath hast",
    "forms of 'do'": "do does did done doing doth dost",
    "negations": "not no never nor neither none nothing nobody nowhere cannot without",
    "articles": "a an the",
    "demonstratives": "this that these those",
    "question words": "who whom whose which what when where why how whoever whatever whenever",
    "quantifiers": "all some any each every both many much few several most more less none "
    "either enough plenty half another other",
    "conjunctions": "and or but nor yet so",
    "subordinating conjunctions": "because although though if while since unless until whereas "
    "whether lest as when where that after before once",
    "comparatives": "more less better worse greater smaller larger higher lower longer shorter "
    "stronger weaker earlier later older younger newer further farther easier harder faster slower "
    "deeper wider closer nearer cheaper richer poorer bigger broader safer happier fewer sooner",
    "superlatives": "most least best worst greatest smallest largest highest lowest longest "
    "shortest strongest weakest earliest latest oldest youngest newest furthest easiest hardest "
    "fastest deepest widest closest nearest cheapest richest poorest biggest first last",
    "prepositions of place": "in on at under over above below between among within upon beside "
    "near behind beyond across through into onto inside outside around along against toward "
    "towards",
    "prepositions": "of in on at by for with from to about against between into through during "
    "before after above below under over upon among within without toward towards per via",
    "adverbs of degree": "very too so quite rather almost nearly hardly scarcely entirely fully "
    "wholly completely merely only just even far highly deeply greatly",
    "adverbs of frequency": "always often never sometimes usually rarely seldom ever frequently",
    "connectives": "however therefore thus hence moreover furthermore nevertheless otherwise "
    "meanwhile accordingly consequently besides also likewise instead",
}
MEANING = {
    "number words": "one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy "
    "eighty ninety hundred thousand million billion trillion hundreds thousands millions billions "
    "dozen zero",
    "large numbers": "hundred thousand million billion trillion hundreds thousands millions "
    "billions trillions",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth last next",
    "months": "january february march april may june july august september october november "
    "december jan feb mar apr jun jul aug sep sept oct nov dec",
    "days of the week": "monday tuesday wednesday thursday friday saturday sunday",
    "units of time": "second seconds minute minutes hour hours day days week weeks month months "
    "year years decade decades century centuries moment moments night nights",
    "adverbs of time": "now then today tomorrow yesterday soon already still yet again once "
    "recently lately tonight hereafter heretofore ago before after",
    "directions": "north south east west northern southern eastern western left right up down "
    "upward downward forward backward",
    "family": "father mother son daughter brother sister wife husband child children parent "
    "parents family families uncle aunt cousin grandfather grandmother sons daughters brothers",
    "people": "man men woman women people person persons boy girl child children citizens citizen",
    "body": "head heart hand hands eye eyes face foot feet blood breast tongue arm arms body ear "
    "ears lips hair bone bones breath cheek brow knee finger fingers",
    "colours": "red green blue yellow black white brown grey gray orange purple pink golden",
    "rank": "king queen lord lady prince princess duke earl sir madam majesty president "
    "emperor count knight captain general minister governor senator",
    "government": "government congress president senate house state states law laws court courts "
    "constitution treaty administration legislature executive department secretary commission",
    "money": "dollar dollars cent cents money tax taxes debt revenue budget price prices cost "
    "costs bank banks currency gold silver treasury credit pound pounds income",
    "war": "war wars army navy military peace enemy enemies weapons troops soldier soldiers "
    "battle forces force defense attack",
    "nations": "america american americans united states britain british england english france "
    "french spain spanish mexico mexican russia russian soviet china chinese japan japanese "
    "germany german europe european africa cuba korea vietnam iraq india rome roman italy",
    "speaking": "say says said saying speak speaks spoke spoken tell tells told ask asks asked "
    "answer answered reply replied call called",
    "knowing": "know knows knew known think thinks thought believe believes believed understand "
    "understood",
    "wanting": "want wants wanted wish wishes wished hope hopes hoped desire desires desired need "
    "needs needed",
    "emotions": "love hate fear joy sorrow grief anger hope pity shame pride rage sad happy glad",
    "evaluation": "good bad great evil best worst fair foul right wrong noble vile true false",
    "types of a program": "int str float bool list dict tuple array none object string bytes "
    "integer boolean tensor dataframe callable ndarray series",
    "words of a program": "return returns raises parameters param args kwargs default optional "
    "example examples note class function method module import self true false see also",
}
WORD_CLASSES: dict[str, list[str]] = {}
for _name, _words in (GRAMMAR | MEANING).items():
    for _word in _words.split():
        WORD_CLASSES.setdefault(_word, []).append(_name)
MEMBERS = {name: set(words.split()) for name, words in (GRAMMAR | MEANING).items()}

IRREGULAR_FORMS = """
be am is are was were been being; have has had having; do does did done doing; go goes went gone
know knew known; see saw seen; say said; get got gotten; make made; take took taken; come came
give gave given; think thought; tell told; find found; become became; leave left; feel felt
bring brought; begin began begun; keep kept; hold held; write wrote written; stand stood
hear heard; let; mean meant; set; meet met; run ran; pay paid; sit sat; speak spoke spoken
lead led; grow grew grown; lose lost; fall fell fallen; send sent; build built; draw drew drawn
break broke broken; spend spent; rise rose risen; drive drove driven; buy bought; wear wore worn
choose chose chosen; seek sought; throw threw thrown; catch caught; deal dealt; win won
fight fought; teach taught; eat ate eaten; sing sang sung; strike struck stricken; hang hung
shake shook shaken; ride rode ridden; fly flew flown; die died dying; lie lay lain lying
man men; woman women; child children; foot feet; tooth teeth; life lives; wife wives
good better best; bad worse worst; much many more most; little less least; far further farthest
this these; that those; i me my mine; he him his; she her hers; we us our ours; they them their
bear bore borne born; swear swore sworn; steal stole stolen; forget forgot forgotten
sleep slept; bind bound; bleed bled; feed fed; flee fled; forbid forbade forbidden; hide hid hidden
index indices; matrix matrices; vertex vertices; axis axes; datum data; maximum maxima
"""
LEMMAS: dict[str, str] = {}
for _forms in re.split(r"[;\n]", IRREGULAR_FORMS.strip()):
    for _form in _forms.split():
        LEMMAS.setdefault(_form, _forms.split()[0])


class Rule(NamedTuple):
    """The conditions of which one must hold, and how well they hold on the contexts."""

    parts: list[Part]
    telling: list[Part]  # those that find more active texts than they see in other texts
    recall: float  # weighted share of the active places
    names: list[str]  # tokens of the active places, those of most weight first

    def holds(self, conditions: set[Condition], telling: bool = False) -> bool:
        parts = self.telling if telling else self.parts
        return any(part <= conditions for part in parts)


# ------------------------------------------------------------------------- conditions of a token


@lru_cache(2**14)
def stem(word: str) -> str:
    """Return what the inflections of a word have in common: 'walk' of walks, walked, walking."""
    if word in LEMMAS:
        return LEMMAS[word]
    root = word
    for ending, replacement in (("ies", "y"), ("ied", "y"), ("ing", ""), ("ed", ""), ("s", "")):
        shorter = word[: -len(ending)] + replacement
        if word.endswith(ending) and len(shorter) >= 3 and re.search("[aeiouy]", shorter):
            if not (ending == "s" and word[-2] in "su"):
                root = shorter
            break
    if root != word and root in LEMMAS:
        return LEMMAS[root]
    if root != word and re.search(r"([bdfgklmnprt])\1$", root) and not root.endswith("ll"):
        root = root[:-1]
    return root[:-1] if len(root) > 3 and root.endswith("e") else root


@lru_cache(2**14)
def _forms(token: str, word: str) -> tuple[Condition, ...]:
    """Conditions on the form of a token and on the word it belongs to."""
    text = token.strip()
    name = text.lower()
    result = [("token", name or token), *(("kind", kind) for kind in _kinds(token))]
    if word != name:
        result.append(("word", word))
    if word.isalpha() and len(word) > 1:
        result.append(("forms", stem(word)))
    result += [("class", word_class) for word_class in WORD_CLASSES.get(word, ())]
    if name.isalpha():
        result += [("prefix", name[:n]) for n in (2, 3, 4, 5) if len(name) > n]
        result += [("suffix", name[-n:]) for n in (2, 3, 4) if len(name) > n]
    return tuple(result)


def _kinds(token: str) -> Iterator[str]:
    text = token.strip()
    if not text:
        yield "line breaks" if "\n" in token else "white space"
    elif re.fullmatch(r"[\d.,]*\d[\d.,]*", text):
        yield "numbers"
        if re.fullmatch(r"1[5-9]\d\d|20\d\d", text):
            yield "years"
    elif re.fullmatch(r"[\W_]+", text):
        yield "punctuation"
        yield from (f"punctuation with {character!r}" for character in set(text))
    elif text.isalpha():
        if not text.isascii():
            yield "letters outside ASCII"
        if len(text) == 1:
            yield "single letters"
        elif text.isupper():
            yield "words in capitals"
        if text[0].isupper() and text[1:].islower():
            yield "capitalised words"
    elif re.search(r"\d", text):
        yield "letters with digits"


def _spans(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Return (first token, end) of the word that each token belongs to."""
    spans: list[tuple[int, int]] = []
    first = 0
    for i, token in enumerate(tokens):
        continues = i and token[:1].isalnum() and tokens[i - 1][-1:].isalnum()
        if not continues:
            spans += [(first, i)] * (i - first)
            first = i
    return spans + [(first, len(tokens))] * (len(tokens) - first)


def conditions(tokens: Sequence[str]) -> list[set[Condition]]:
    """Return what holds for each token of a text, in itself and by its neighbours."""
    tokens = [token[:TOKEN_CHARS] for token in tokens]
    spans = _spans(tokens)
    words = ["".join(tokens[first:end]).strip().lower()[:TOKEN_CHARS] for first, end in spans]
    result = []
    for i, (token, (first, end)) in enumerate(zip(tokens, spans, strict=True)):
        holding = set(_forms(token, words[i]))
        if end - first > 1:
            places = ("first", "last") if i in (first, end - 1) else ("inner", "inner")
            holding.add(("part", places[i != first]))
        before = "".join(tokens[max(0, first - 3) : first]).rstrip(" \t")
        if not first or re.search(r"[.!?:][\"'\u201d\u2019)\]]*\s*$|\n\s*$", before):
            holding.add(("start", "sentence"))
        if not before or before.endswith("\n"):
            holding.add(("start", "line"))
        if first:
            holding |= _neighbour("after", tokens[first - 1], words[first - 1])
        if end < len(tokens):
            holding |= _neighbour("before", tokens[end], words[end])
        if i + 1 < end:
            holding.add(("next piece", tokens[i + 1].lower()))
        result.append(holding)
    return result


@lru_cache(2**14)
def _neighbour(side: str, token: str, word: str) -> frozenset[Condition]:
    """Conditions on the word before a token or after it."""
    kinds = {(f"{side} kind", kind) for kind in _kinds(token) if " with " not in kind}
    classes = {(f"{side} class", word_class) for word_class in WORD_CLASSES.get(word, ())}
    return frozenset({(side, word)} | kinds | classes if word else kinds)


# ---------------------------------------------------------------------- the contexts of a latent


def windows(entry: Mapping[str, Any]) -> list[Window]:
    """Return the windows of an entry's contexts, the strongest first.

    Where there are no tokens they are made from the text, whose marked part is the active token.
    """
    columns = [entry.get(name) for name in ("tokens", "position", "activations")]
    if all(isinstance(column, list) for column in columns):
        strengths = entry.get("token_activations") or [[]] * len(columns[0])
        rows = zip(*columns, strengths, strict=False)
        result = [_near(*row) for row in rows if _is_window(*row)][:MAX_CONTEXTS]
        if result:
            return result
    return [_from_text(context) for context in entry["contexts"][:MAX_CONTEXTS]]


def _is_window(tokens: Any, position: Any, activation: Any, strengths: Any) -> bool:
    is_text = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    return (
        is_text
        and isinstance(position, int)
        and 0 <= position < len(tokens)
        and isinstance(activation, int | float)
        and isinstance(strengths, list)
    )


def _near(tokens: list[str], position: int, activation: float, strengths: list) -> Window:
    """The tokens near the active one, with all active tokens among them."""
    first = max(0, position - REACH)
    near = tokens[first : position + REACH + 1]
    active = {position - first: activation}
    for pair in strengths:
        if isinstance(pair, list) and len(pair) == 2 and first <= pair[0] < first + len(near):
            active[pair[0] - first] = max(pair[1], active.get(pair[0] - first, 0))
    return near, list(active), list(active.values())


def _from_text(context: Mapping[str, Any]) -> Window:
    before, mark, rest = str(context["context"]).partition(OPEN)
    token, _, after = rest.partition(CLOSE)
    if not mark:
        before, token, after = "", str(context["token_class"]), ""
    pieces = [
        re.findall(r"\s*[^\W_]+|\s*[\W_]|\s+", text)
        for text in (before[-TEXT_CHARS:], after[:TEXT_CHARS])
    ]
    tokens = [*pieces[0][-REACH:], token[:TOKEN_CHARS], *pieces[1][:REACH]]
    return tokens, [len(pieces[0][-REACH:])], [float(context["activation"])]


# ---------------------------------------------------------------------------- the choice of a rule


class Places(NamedTuple):
    """Tokens of a latent's contexts."""

    active: list[tuple[set[Condition], float, int]]  # conditions, weight, number of the context
    others: list[set[Condition]]


def _places(entry: Mapping[str, Any]) -> tuple[Places, Counter[str]]:
    """Return the places of an entry, and the weight of each active token."""
    places = Places([], [])
    names: Counter[str] = Counter()
    for number, (tokens, active, strengths) in enumerate(windows(entry)):
        holding = conditions(tokens)
        for index, strength in zip(active, strengths, strict=True):
            weight = max(strength, 1e-6) ** WEIGHT_POWER
            places.active.append((holding[index], weight, number))
            names[tokens[index].strip().lower()[:TOKEN_CHARS] or repr(tokens[index])] += weight
        silent = set(range(len(tokens))) - set(active)
        places.others.extend(holding[index] for index in silent)
    return places, names


def _worth(recall: float, false_alarms: float) -> float:
    """Expected mean of both tests' accuracies: of marked tokens and of texts, up to constants."""
    silent_text = (1 - false_alarms) ** ALARM_TOKENS
    return recall + (silent_text + 1 - false_alarms) / 2 - 1


def choose_rule(entry: Mapping[str, Any]) -> Rule:
    """Return the rule of an entry: conditions are added while they are worth their words."""
    places, names = _places(entry)
    total = sum(weight for _, weight, _ in places.active)
    active, others = places.active, places.others
    n_others = len(others)
    counts = Counter(chain.from_iterable(others))
    parts: list[Part] = []
    telling: list[Part] = []
    recall = 0.0
    alarms = 0
    while active and len(parts) < MAX_PARTS:
        part = _best_part(active, others, counts, total, n_others, recall, alarms)
        if part is None:
            break
        left = [place for place in active if not part <= place[0]]
        # Few of the others go, so what is left of them is not counted anew.
        counts.subtract(chain.from_iterable(holding for holding in others if part <= holding))
        silent = [holding for holding in others if not part <= holding]
        gained = sum(weight for _, weight, _ in active) - sum(weight for _, weight, _ in left)
        new_alarms = alarms + len(others) - len(silent)
        worth = _worth(recall, _rate(alarms, n_others)) if parts else 0.0
        gain = _worth(recall + gained / total, _rate(new_alarms, n_others)) - worth
        if gain < (WORD_COST if _is_word(part) else PART_COST):
            break
        parts.append(part)
        if gained / total > 1 - (1 - _rate(new_alarms - alarms, n_others)) ** TEXT_TOKENS:
            telling.append(part)
        recall += gained / total
        alarms = new_alarms
        active, others = left, silent
    return Rule(parts, telling or parts, recall, [name for name, _ in names.most_common()])


def _is_word(part: Part) -> bool:
    return all(kind in ("token", "forms") for kind, _ in part)


def _rate(alarms: int, n_others: int) -> float:
    return (alarms + 0.5) / (n_others + 1) if n_others else 0.01


def _best_part(
    active: Sequence[tuple[set[Condition], float, int]],
    others: Sequence[set[Condition]],
    counts: Counter[Condition],
    total: float,
    n_others: int,
    recall: float,
    alarms: int,
) -> Part | None:
    """Return the best condition or pair of conditions for the places that are left, or None.

    counts: in how many of the others each condition holds.
    """

    def best(
        places: Sequence[tuple[set[Condition], float, int]],
        counts: Counter[Condition],
    ) -> tuple[float, Condition] | None:
        weights: Counter[Condition] = Counter()
        contexts: dict[Condition, set[int]] = {}
        for holding, weight, number in places:
            for condition in holding:
                weights[condition] += weight
                contexts.setdefault(condition, set()).add(number)
        ranked = [
            (
                _worth(recall + weight / total, _rate(alarms + counts[condition], n_others))
                + PREFERENCE.get(condition[0], 0.0)
                + LENGTH_PREFERENCE * len(condition[1]),
                condition,
            )
            for condition, weight in weights.items()
            if len(contexts[condition]) > 1 or condition[0] == "token"
        ]
        return max(ranked, default=None)

    first = best(active, counts)
    if first is None:
        return None
    worth, condition = first
    part = frozenset([condition])
    matched = [
        (holding - part, weight, number) for holding, weight, number in active if part <= holding
    ]
    alarming = (holding for holding in others if part <= holding)
    second = best(matched, Counter(chain.from_iterable(alarming)))
    if second is not None and second[0] > worth + PART_COST:
        part |= {second[1]}
    return part


# Of conditions of equal worth, the one that says most about the token itself, and the longest.
LENGTH_PREFERENCE = 1e-4
PREFERENCE = {
    "token": 0.02,
    "forms": 0.035,
    "class": 0.03,
    "kind": 0.02,
    "word": 0.01,
    "start": 0.025,
    "after kind": -0.02,
    "before kind": -0.02,
    "after class": -0.01,
    "before class": -0.01,
    "prefix": -0.01,
    "suffix": -0.01,
}

# ----------------------------------------------------------------------------------- the label

PHRASES = {
    "token": "the token {!r}",
    "word": "pieces of the word {!r}",
    "forms": "forms of {!r}",
    "class": "{}",
    "kind": "{}",
    "prefix": "tokens that begin with {!r}",
    "suffix": "tokens that end in {!r}",
    "part": "the {} piece of a word",
    "start": "the first token of a {}",
    "after": "what follows {!r}",
    "before": "what comes before {!r}",
    "after kind": "what follows {}",
    "before kind": "what comes before {}",
    "after class": "what follows {}",
    "before class": "what comes before {}",
    "next piece": "what the piece {!r} continues",
}


# How several conditions of a kind, each a part of its own, are listed in place of the first.
PLURALS = {"forms": "forms of {}", "token": "the tokens {}"}


def _shown_value(kind: str, value: str, names: Sequence[str]) -> str:
    """Return the value of a condition as a label shows it: for a stem its shortest token."""
    if kind != "forms":
        return value
    return min((name for name in names if stem(name) == value), key=len, default=value)


def _phrase(part: Part, names: Sequence[str]) -> str:
    order = list(PHRASES)
    # By value too, because the order of a set differs from one process to the next.
    in_order = sorted((order.index(kind), value) for kind, value in part)
    return ", if it is ".join(
        PHRASES[order[place]].format(_shown_value(order[place], value, names))
        for place, value in in_order
    )


def _phrases(rule: Rule) -> list[str]:
    """Return what a label says of a rule: a phrase a part, and one for all words, or all forms."""
    groups: dict[str | Part, list[Part]] = {}
    for part in rule.parts:
        kind = next(iter(part))[0]
        is_listed = len(part) == 1 and kind in PLURALS
        groups.setdefault(kind if is_listed else part, []).append(part)
    phrases = []
    for key, parts in groups.items():
        if len(parts) == 1:
            phrases.append(_phrase(parts[0], rule.names))
            continue
        values = [_shown_value(*condition, rule.names) for part in parts for condition in part]
        phrases.append(PLURALS[str(key)].format(", ".join(map(repr, values))))
    return phrases


def _explanation(rule: Rule) -> str:
    examples = ", ".join(map(repr, rule.names[:SHOWN_WORDS]))
    if not rule.parts:
        return f"{NO_RULE}; tokens such as {examples}"
    tokens = [value for part in rule.parts for kind, value in part if kind == "token"]
    shown = "" if len(tokens) == len(rule.parts) else f", such as {examples}"
    return f"{'; or '.join(_phrases(rule))}{shown} ({rule.recall:.0%} of the active tokens)"


def label(rule: Rule) -> dict[str, Any]:
    """Return what a rule is as a label; its explanation begins with "[by rule]"."""
    is_rule = bool(rule.parts) and rule.recall >= MIN_RECALL
    score = 1
    if is_rule:
        n_parts = len(rule.parts)
        score = 3 if n_parts > 1 else 4
        score += (rule.recall >= 0.9) - (n_parts > 4)
    names = {value for part in rule.parts for kind, value in part if kind == "class"}
    level = "high-level" if names and names <= set(MEANING) else "low-level"
    return {
        "category": level if is_rule else "undiscernible",
        "score": score,
        "polysemantic": not is_rule,
        "explanation": f"{BY_RULE_MARK} {_explanation(rule)}"[:EXPLANATION_CHARS],
    }


def answers(rule: Rule, texts: Sequence[tuple[Sequence[str], Sequence[int]]]) -> list[bool]:
    """Return whether a rule holds for each (tokens, indices of those in question).

    It holds if one of those tokens meets it. Where all tokens of a text are in question, only its
    telling conditions count: common tokens are in every text.
    """
    result = []
    for tokens, indices in texts:
        holding = conditions(tokens)
        telling = len(indices) == len(tokens)
        result.append(any(rule.holds(holding[index], telling) for index in indices))
    return result
