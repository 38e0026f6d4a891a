"""The demo's data: hurried visit notes of a doctor's practice, and the reports that the practice wants made of them.

    python -m headstart.demo.generate FOLDER    writes visits.jsonl and visits_held_out.jsonl

Every patient is made up. A note is shorthand in one of several hands; its report is always in the one house style, so
what there is to learn is the practice's abbreviations, its order of sections and its wording.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 7
TRAIN_ROWS, HELD_OUT_ROWS = 240, 60
SYSTEM = "Turn the doctor's visit note into a report in the house style of the practice."

NAMES = (  # noqa: SIM905 (fifty quoted names would be harder to read)
    "Adler Baker Chen Diaz Evans Fuchs Grant Haas Ito Jansen Khan Lopez Meyer Novak Okafor Patel Quinn Rossi Silva Tanaka "
    "Ueda Vogel Weber Young Zimmer Abbott Brandt Costa Duval Ellis Fischer Garcia Hughes Ivanov Jung Keller Lang Moreau "
    "Nolan Olsen Park Reyes Santos Thomas Unger Varga Walsh Xu Yilmaz Zeller"
).split()
SPANS = (("1d", "1 day"), ("2d", "2 days"), ("3d", "3 days"), ("5d", "5 days"), ("1w", "1 week"), ("2w", "2 weeks"))
REVIEWS = (("3d", "3 days"), ("1w", "1 week"), ("2w", "2 weeks"), ("1m", "1 month"))


@dataclass(frozen=True)
class Case:
    """A condition in both tongues: shorthand as the doctor writes it, and the words of the report."""

    complaint: tuple[str, str]
    finding: tuple[str, str]
    diagnosis: tuple[str, str]
    plan: tuple[str, str]
    fever: bool = False


CASES = (
    Case(("sore throat", "Sore throat"), ("tonsils red", "Tonsils red"), ("ac tonsillitis", "Acute tonsillitis"), ("pen V 500 bd 7d", "Penicillin V 500 mg twice daily for 7 days"), True),
    Case(("cough + fever", "Cough and fever"), ("creps R base", "Crackles at the right base"), ("pneumonia", "Pneumonia"), ("amoxi 500 tds 7d", "Amoxicillin 500 mg three times daily for 7 days"), True),
    Case(("earache L", "Earache, left"), ("TM red L", "Left eardrum red"), ("ac otitis media", "Acute otitis media"), ("ibu 400 tds 3d", "Ibuprofen 400 mg three times daily for 3 days"), True),
    Case(("burning on PU", "Burning on passing urine"), ("urine nitrite +", "Urine positive for nitrite"), ("UTI", "Urinary tract infection"), ("nitro 100 bd 3d", "Nitrofurantoin 100 mg twice daily for 3 days")),
    Case(("low back pain", "Low back pain"), ("SLR neg", "Straight leg raise negative"), ("mech LBP", "Mechanical low back pain"), ("ibu 400 tds 5d + physio", "Ibuprofen 400 mg three times daily for 5 days; physiotherapy")),
    Case(("HA", "Headache"), ("neuro nad", "Neurological examination normal"), ("tension HA", "Tension headache"), ("para 1g prn", "Paracetamol 1 g as needed")),
    Case(("SOB + wheeze", "Shortness of breath and wheeze"), ("exp wheeze both", "Expiratory wheeze on both sides"), ("asthma exac", "Exacerbation of asthma"), ("pred 40 od 5d", "Prednisolone 40 mg once daily for 5 days")),
    Case(("itchy rash arms", "Itchy rash on the arms"), ("red dry plaques", "Red, dry plaques"), ("eczema", "Eczema"), ("HC 1% bd 7d", "Hydrocortisone 1% twice daily for 7 days")),
    Case(("heartburn", "Heartburn"), ("abdo soft", "Abdomen soft"), ("GORD", "Reflux disease"), ("omep 20 od 4w", "Omeprazole 20 mg once daily for 4 weeks")),
    Case(("runny nose sneezing", "Runny nose and sneezing"), ("nasal mucosa pale", "Nasal mucosa pale"), ("hay fever", "Hay fever"), ("cetiriz 10 od", "Cetirizine 10 mg once daily")),
    Case(("knee pain R", "Knee pain, right"), ("no effusion", "No effusion"), ("OA knee", "Osteoarthritis of the knee"), ("para 1g prn + physio", "Paracetamol 1 g as needed; physiotherapy")),
    Case(("red eye L", "Red eye, left"), ("discharge, VA nl", "Discharge, vision normal"), ("conjunctivitis", "Conjunctivitis"), ("chloramph drops qds 5d", "Chloramphenicol drops four times daily for 5 days")),
    Case(("D+V", "Diarrhoea and vomiting"), ("not dehydrated", "Not dehydrated"), ("gastroent", "Gastroenteritis"), ("ORS, rest", "Oral rehydration and rest"), True),
    Case(("ankle twist R", "Twisted ankle, right"), ("swollen, can WB", "Swollen, can bear weight"), ("ankle sprain", "Ankle sprain"), ("RICE + ibu 400 tds 3d", "Rest and ice; ibuprofen 400 mg three times daily for 3 days")),
    Case(("tired", "Tiredness"), ("pale, HR nl", "Pale, heart rate normal"), ("?anaemia", "Suspected anaemia"), ("FBC + ferritin", "Full blood count and ferritin")),
    Case(("dizzy on standing", "Dizziness on standing"), ("BP drop 20", "Blood pressure drops by 20"), ("orthostatic hypoT", "Orthostatic hypotension"), ("fluids, stop amlod", "More fluids; stop amlodipine")),
)  # fmt: skip


def make_rows(count: int, seed: int) -> list[dict[str, object]]:
    """Return rows of chat messages, each patient another: the same for the same seed."""
    chance = random.Random(seed)  # noqa: S311 (a data set, not a secret)
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    while len(rows) < count:
        note, report = _visit(chance)
        if note not in seen:
            seen.add(note)
            texts = zip(("system", "user", "assistant"), (SYSTEM, note, report), strict=True)
            rows.append({"messages": [{"role": role, "content": content} for role, content in texts]})
    return rows


def _visit(chance: random.Random) -> tuple[str, str]:
    case = chance.choice(CASES)
    name, age = chance.choice(NAMES), chance.randint(4, 88)
    woman = chance.random() < 0.5
    span, review = chance.choice(SPANS), chance.choice(REVIEWS)
    degrees = f"{38 + chance.randint(0, 15) / 10:.1f}" if case.fever else f"{36 + chance.randint(3, 9) / 10:.1f}"
    short_title, title = ("f", "Mrs" if age > 17 else "Miss") if woman else ("m", "Mr" if age > 17 else "Master")
    who = (f"{name} {short_title}{age}", f"{short_title} {age}, {name}", f"{name}, {age}{short_title}")[
        chance.randrange(3)
    ]
    complaint = (
        f"{case.complaint[0]} {span[0]}",
        f"{span[0]} {case.complaint[0]}",
        f"c/o {case.complaint[0]} x{span[0]}",
    )
    parts = [chance.choice(complaint), f"T {degrees}", case.finding[0]]
    if chance.random() < 0.3:
        parts[1], parts[2] = parts[2], parts[1]
    impression = chance.choice((case.diagnosis[0], f"imp {case.diagnosis[0]}", f"Dx {case.diagnosis[0]}"))
    follow = chance.choice((f"rv {review[0]}", f"r/v {review[0]}", f"back {review[0]}"))
    note = chance.choice((". ", ", ", " - ")).join([who, *parts, impression, case.plan[0], follow])
    if chance.random() < 0.3:
        note = note.lower()
    report = "\n".join(
        [
            f"Patient: {title} {name}, {age}",
            f"Reason: {case.complaint[1]} for {span[1]}",
            f"Findings: {case.finding[1]}, {degrees} degrees",
            f"Diagnosis: {case.diagnosis[1]}",
            f"Plan: {case.plan[1]}; review in {review[1]}",
        ]
    )
    return note, report


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> None:
    """Write the demo's two files; no row of one is in the other."""
    rows = make_rows(TRAIN_ROWS + HELD_OUT_ROWS, SEED)
    write_rows(folder / "visits.jsonl", rows[:TRAIN_ROWS])
    write_rows(folder / "visits_held_out.jsonl", rows[TRAIN_ROWS:])


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
