"""Who is who: person and session of every file, from a table, BIDS names, the content, or what the names vary in.

The guarantee is one-sided: two visits or repetitions of one person are never taken for two people, or nobody's scan
could be trusted to be new to a model. Where a name may be read in two ways, the coarser one is taken if that is safe,
and `Unclear` raised if it is not.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from companion.data.intake.walk import natural

HOW = (
    "give a table that says so (a CSV or TSV file with the columns file, subject and, if you like, session and split; "
    "file is the path below the folder), or name files in the manner of BIDS: sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
)


class Unclear(ValueError):
    """Nobody can tell from a folder whose files these are; the message says how to tell."""


@dataclass(frozen=True)
class Whose:
    """A person, a session ("" if there is one only) and how that is known: table, BIDS, content, name or folder."""

    person: str
    session: str
    told: str


EDGE, END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
BIDS = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9+]+)(?=[/_.]|$)")
BIDS_SESSION = re.compile(r"(?:^|[/_])ses-([A-Za-z0-9+]+)(?=[/_.]|$)")
# Names of well-known collections in which the first number is not the person, or not all of it.
KNOWN = [
    re.compile(form)
    for form in (
        r"(?P<person>\d{3}_S_\d{4,5})(?!\d)",  # ADNI: site _S_ subject
        r"(?P<person>OAS\d_\d{4})(?:_(?P<session>MR\d+))?",  # OASIS 1 and 2
        r"(?P<person>OAS\d{5})(?:_\w+?_(?P<session>d\d{4}))?",  # OASIS 3
        r"(?P<person>TCGA-\w\w-\w{4})",
        r"(?P<person>[Bb]ra[Tt][Ss]1[789]_\w+?)_(?P<session>\d+)(?=[_/.]|$)",  # BraTS 2017 to 2019
        r"(?P<person>BraTS-\w+-\d{5})-(?P<session>\d{3})",  # BraTS 2023
        r"(?P<person>IXI\d{3})(?=-)",
        r"(?P<person>CC\d{4})_[a-z]+_(?:15|3)_\d+_[MF]",  # CC359
        r"file_(?:brain|knee|prostate|breast)_\w+?_\d+_(?P<person>\d{5,})",  # fastMRI
        r"(?:^|/)(?P<person>[^/]+)/mri/",  # FreeSurfer
    )
]
EXPLICIT = re.compile(
    EDGE + r"(?P<person>(?:sub|subj|subject|patient|pat|pt|participant|person|volunteer|healthy|control|case|proband)"
    r"s?[-_ ]?[A-Za-z]{0,4}[-_]?\d+)(?!\d)",
    re.IGNORECASE,
)
_NUMBERED = (
    "ses|sess|session|visit|tp|timepoint|time|scan|run|rep|repeat|repetition|mr|mpr|echo|acq|frame|phase|slice|day|week"
    "|month|mon|year|wave|avg"
)
_DATE = (
    r"(?:19|20)\d\d[-_]?(?:0[1-9]|1[0-2])[-_]?(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T]?\d\d[-_.:]?\d\d[-_.:]?\d\d(?:\.\d+)?)?"
)
SESSION = re.compile(
    EDGE + rf"(?:(?:{_NUMBERED})[-_ ]?\d+|(?:ses|session|visit)-?[A-Z]|baseline|followup|follow-up|retest|pre|post"
    rf"|preop|postop|{_DATE}){END}",
    re.IGNORECASE,
)
WEAK_SESSION = re.compile(EDGE + r"[mvydtb]\d{1,3}" + END, re.IGNORECASE)  # m12, v1: a session beside something else
# What is in a file, not whose it is. A contrast may end in the number of a repetition: T101, FLAIR02 (M4Raw).
_CONTRAST = (
    r"(?:ax|sag|cor|tra|se|tse|gre|w)?(?:t1|t2|t2star|pd|flair|t2flair)"
    r"(?:w|wi|c|ce|gd|n|f|fs|s|rho|post|pre|fse|tse|map|_?mprage|w?_?brain)?"
    r"|corpd(?:fs)?(?:_fbk)?|mp2?rage|i?r?spgr|fspgr|dwi|adc|dti|swi|mra|angio|bold|func|asl|cbf|qsm|ct|cta|pet|fdg"
    r"|mri?|anat|unit1|inv[12]"
)
CONTRAST = re.compile(EDGE + rf"(?P<contrast>{_CONTRAST})(?P<repeat>\d\d)?{END}", re.IGNORECASE)
PROCESSING = re.compile(
    EDGE
    + r"(?:(?:space|desc|res|label|acq|rec|dir|den|hemi|task|ce|mod|part|inv|from|to|mode)-[A-Za-z0-9+]+"
    + r"|brain|bet|stripped|skullstripped|ss|staple|(?:brain)?masks?|preproc|restored?|acpc|dc|norm|n4|bias|corrected"
    + r"|reg|registered|warped|mni(?:152)?[A-Za-z0-9]*|crop(?:ped)?|resampled|denoised|defaced?|orig|raw|final|segs?"
    + r"|segmentations?|aseg|aparc|gt|dseg|probseg|prob|pve|mean|magnitude|labels?(?:tr|ts)?|images?(?:tr|ts)?|mag"
    + r"|real|imag|nii|nifti|dicom|dcm|derivatives|sourcedata|rawdata|[123]d|\d+(?:\.\d+)?mm"
    + r"|(?:ge|philips|siemens)?(?:1\.5|3|7)t)"
    + END,
    re.IGNORECASE,
)
GROUP = re.compile(
    r"(?:site|cent(?:er|re)|hospital|clinic|group|cohort|batch|part|set|fold|scanner|vendor|dataset|ds|grade)[-_ ]?\d*"
    r"|hgg|lgg|train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing|s)?|controls?|patients?|healthy|male|female|ad|cn|mci|tr|ts",
    re.IGNORECASE,
)


def whose(
    names: Sequence[str], said: Mapping[str, tuple[str, str]] | None = None, folder: str = ""
) -> dict[str, Whose]:
    """Return the person and session of each file of a folder, by the names of the files below it.

    said: name -> (person, session) that the content states, "" where it is silent. folder: the name of the folder
    itself, for the person if there is one only. Of a few files that are named unlike all others the person is "".
    Raises Unclear when it cannot be told.
    """
    said, found, silent = dict(said or {}), {}, []
    for name in names:
        person, session = said.get(name, ("", ""))
        if match := BIDS.search(name):
            visit = BIDS_SESSION.search(name)
            found[name] = Whose(match[1], visit[1] if visit else session, "BIDS")
        elif person:
            found[name] = Whose(person, session or _session(name), "content")
        else:
            silent.append(name)
    _check_content(found)
    found |= _by_names(silent, folder)
    return {name: found[name] for name in names}


def _check_content(found: Mapping[str, Whose]) -> None:
    """Refuse identities that an anonymisation has made the same for everybody."""
    stated = [name for name, who in found.items() if who.told == "content"]
    if len(stated) < 2 or len({found[n].person for n in stated}) > 1:
        return
    explicit = {_key(match) for name in stated if (match := _certain(name))}
    if len(explicit) > 1:
        raise Unclear(
            f"all {len(stated)} files say that they are of one patient, but their names tell {len(explicit)} people "
            f"({_some(sorted(explicit, key=natural))}); {HOW}"
        )


def _by_names(names: Sequence[str], folder: str) -> dict[str, Whose]:
    certain = {name: match for name in names if (match := _certain(name))}
    found = {name: Whose(_key(m), _session(name, m), "name") for name, m in certain.items()}
    rest = [name for name in names if name not in certain]
    candidates = {name: _candidates(name) for name in rest}
    count = Counter(word for words in candidates.values() for word in {w.lower() for w, _ in words})
    varying = {name: [(w, at) for w, at in words if count[w.lower()] < len(rest)] for name, words in candidates.items()}
    _check_groups(varying)
    nobody = []
    for name, words in varying.items():
        person = _person(name, words)
        if person:
            found[name] = Whose(person, _session(name), "name")
        else:
            nobody.append(name)
    odd = len(nobody) < len(names)  # a file or two that are named in another way than all others
    if nobody and odd and 5 * len(nobody) <= len(names):
        return found | {name: Whose("", "", "") for name in nobody}
    if nobody and not odd and _one_with_visits(nobody, candidates):
        return found | {n: Whose(_person(n, candidates[n]), _session(n), "folder") for n in nobody}
    if nobody and odd or not _differ_in_kind(nobody):
        raise Unclear(f"cannot tell whose files these are: {_some(nobody)}; {HOW}")
    for name in nobody:  # one person, in this folder
        words = [w for w, _ in candidates[name] if _numbered(w)]
        found[name] = Whose(_person(name, candidates[name][:1]) if words else folder or _stem(name), "", "folder")
    if len({found[n].person for n in nobody}) > 1:
        found |= {n: Whose(found[nobody[0]].person, _session(n), "folder") for n in nobody}
    return found


def certain(name: str) -> str:
    """Return the person of a name in which a mark is known to be one (BIDS, IXI012, OAS1_0001, patient7), else ""."""
    if match := BIDS.search(name):
        return match[1]
    return _key(match) if (match := _certain(name)) else ""


def _certain(name: str) -> re.Match | None:
    """A person's mark that is known to be one: of a well-known collection, or with a word such as patient before it."""
    return next((m for form in (*KNOWN, EXPLICIT) if (m := form.search(name))), None)


def _key(match: re.Match) -> str:
    """The person's name of a match, with the site's folder before it, if that numbers people anew."""
    before = match.string[: match.start("person")].split("/")[:-1]
    site = [
        part for part in before if re.fullmatch(r"(?:site|cent(?:er|re)|hospital|dataset|ds|scanner)[-_ ]?\w+", part)
    ]
    return "/".join([*site, re.sub(r"[ _-]+", "_", match["person"]) if match.re is EXPLICIT else match["person"]])


def _stem(name: str) -> str:
    return re.sub(r"(?:\.(?:nii|mnc|img|hdr|mgz|gz|bz2|[A-Za-z]\w{0,4}))+$", "", name.rsplit("/", 1)[-1])


def _stem_path(name: str) -> str:
    return name[: len(name) - len(name.rsplit("/", 1)[-1]) + len(_stem(name))]


def _candidates(name: str) -> list[tuple[str, int]]:
    """The words of a path that may say who it is, and where each ends in it: neither contrast nor session nor kind."""
    text = _stem_path(name)
    for form in (SESSION, CONTRAST, PROCESSING):
        for _ in range(2):  # neighbours share the character between them
            text = form.sub(lambda m: "_" * len(m[0]), text)
    words = [(m[0], m.end()) for m in re.finditer(r"[^\W_]+", text)]
    kept = [(w, at) for w, at in words if not WEAK_SESSION.fullmatch(w)]
    return kept if any(_numbered(w) for w, _ in kept) else words


def _numbered(word: str) -> bool:
    return bool(re.search(r"\d", word)) and not GROUP.fullmatch(word)


def _person(name: str, words: Sequence[tuple[str, int]]) -> str:
    """The part of the path up to the first number that varies, or the first word if no number does."""
    at = next((end for w, end in words if _numbered(w)), None)
    if at is None:
        word = next(((w, end) for w, end in words if not GROUP.fullmatch(w)), words[0] if words else None)
        if word is None:
            return ""
        at = word[1]
    kept, start = [], 0
    for part in name[:at].split("/"):
        end = start + len(part)
        if end >= at or any(start < e <= end for _, e in words):  # folders that are the same for all say nothing
            kept.append(_who(part))
        start = end + 1
    return "/".join(kept)


def _who(part: str) -> str:
    """A part of a path without what it says of contrast, processing and visit: mri_7 and pet_7 are of one person."""
    bare = part
    for form in (SESSION, CONTRAST, PROCESSING):
        bare = form.sub("", bare)
    bare = re.sub(r"([_\-. ])[_\-. ]+", r"\1", bare).strip("_-. ")
    return bare if re.search(r"\w", bare) else part


def _check_groups(varying: Mapping[str, Sequence[tuple[str, int]]]) -> None:
    """Refuse numbers that begin anew in every folder of an unknown kind: a person's scans, or a site's people?"""
    numbers, example = defaultdict(set), defaultdict(list)
    for name, words in varying.items():
        first = next((i for i, (w, _) in enumerate(words) if _numbered(w)), None)
        if not first:
            continue
        if before := [w.lower() for w, _ in words[:first] if not GROUP.fullmatch(w)]:
            numbers[words[first][0].lower()].add(tuple(before))
            example[words[first][0].lower()].append(name)
    for number, groups in numbers.items():
        if len(groups) > 1:
            raise Unclear(
                f"cannot tell people from their scans: the number {number} is in {_some(example[number], 3)}; "
                f"is it a person, or a scan of one? {HOW}"
            )


def _one_with_visits(names: Sequence[str], candidates: Mapping[str, Sequence[tuple[str, int]]]) -> bool:
    """Whether all names have the same number of a person, and differ in visit, contrast or processing only."""
    numbers = {next((w for w, _ in candidates[name] if _numbered(w)), "") for name in names}
    bare = {SESSION.sub("_", PROCESSING.sub("_", CONTRAST.sub("_", _stem_path(name)))) for name in names}
    return (
        len(names) > 1
        and len(numbers) == 1
        and "" not in numbers
        and len({re.sub(r"[\W_]+", "_", b) for b in bare}) == 1
    )


def _differ_in_kind(names: Sequence[str]) -> bool:
    """Whether names of one person differ in contrast or processing, and not only in a number of something."""
    bare = {PROCESSING.sub("_", CONTRAST.sub("_", _stem_path(name))) for name in names}
    return len({re.sub(r"[\W_]+", "_", text).strip("_") for text in bare}) < 2


def _session(name: str, match: re.Match | None = None) -> str:
    """What a path says of the visit or repetition, "" if nothing."""
    if match is not None and match.re.groupindex.get("session") and match["session"]:
        return match["session"]
    rest = name[match.end("person") :] if match is not None else name
    folder, stem = rest.rpartition("/")[0], _stem(rest)
    words = [m[0] for part in (folder, stem) for m in SESSION.finditer(part)]
    words += [m["contrast"] + m["repeat"] for m in CONTRAST.finditer(stem) if m["repeat"]]
    return "_".join(dict.fromkeys(w.lower() for w in words))


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
