"""In which language a text is written, as far as its commonest words tell.

Nearly a third of any running text are a few words that hold its sentences together, and these differ from language to language.
That tells apart whole rows of a dozen words and more, in some twenty languages; names, lists and code have none.
"""

from __future__ import annotations

import re
from collections import Counter

LOOKED_AT = 4_000  # characters: more tell no more
# Of a language: so many of its words, so many of them distinct, such a part of all, so many times those of the next.
LEAST_WORDS, LEAST_DISTINCT, LEAST_FRAC, LEAST_LEAD = 4, 3, 0.12, 1.5
COMMON = {
    "English": "the of and to in is that for it with was on as are this be you have not at from by my me what how can do will an so we they he she his her but or if would your there been has",
    "German": "der die und das ist nicht ein eine zu den mit von sich auf für dem es ich sie wie auch im wird",
    "French": "le la les de des et est un une en que du dans qui pour pas sur au il ne vous je avec ce",
    "Spanish": "el la los de y que en un una es por con no para las se del lo su al como más pero",
    "Italian": "il di che la e è un una in per non con del della si le sono gli alla dei i nel più",
    "Portuguese": "o de que e a do da em um uma para com não os no na se por as dos mais ao é",
    "Dutch": "de het een en van in is dat op te zijn niet met voor ik je die aan er maar ook als wordt",
    "Swedish": "och att det som en på är av för med till den inte har ett jag om var så de",
    "Danish or Norwegian": "og at det som en på er af av for med til den ikke har et jeg om var så de i",
    "Polish": "i w na się nie z jest do to że o jak po co ale za od przez dla są",
    "Czech": "a se na je že v to s z do o jako i ale po pro jsou byl není za",
    "Romanian": "și de în la a cu pe nu că este un o care mai din să pentru se ce sunt",
    "Turkish": "ve bir bu da de için ile çok ne gibi daha var olarak ben o ama en olan mi değil",
    "Hungarian": "a az és hogy nem is egy van ez meg csak de volt mint már el ha még azt vagy",
    "Finnish": "ja on ei että se en oli hän mutta joka ovat kun niin tai mitä kuin myös ole sen",
    "Indonesian": "yang dan di dengan untuk tidak dari ini itu dalam akan pada saya ada adalah ke juga bisa atau oleh",
    "Vietnamese": "là và của có không được cho một các người với này trong những để đã khi từ tôi",
    "Russian": "и в не на что с по как это он а то все но из у за от так для",
    "Ukrainian": "і в не на що з та до як це за він але у від для є про бути або",
}
_OF_WORD: dict[str, list[str]] = {}  # a letter alone is as often an initial, or what an apostrophe left
for _name, _words in COMMON.items():
    for _word in (word for word in _words.split() if len(word) > 1):
        _OF_WORD.setdefault(_word, []).append(_name)
_WORD = re.compile(r"[^\W\d_]+")


def main_language(text: str) -> str:
    """Return the language of a text; empty where its words don't tell."""
    words = Counter(_WORD.findall(text[:LOOKED_AT].lower()))
    hits: Counter[str] = Counter()
    distinct: Counter[str] = Counter()
    for word, count in words.items():
        for name in _OF_WORD.get(word, ()):
            hits[name] += count
            distinct[name] += 1
    (best, most), (_, second) = [*hits.most_common(2), ("", 0), ("", 0)][:2]
    enough = most >= max(LEAST_WORDS, LEAST_FRAC * words.total()) and distinct[best] >= LEAST_DISTINCT
    return best if enough and most >= LEAST_LEAD * second else ""
