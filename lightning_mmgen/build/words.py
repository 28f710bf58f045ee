"""Word lists: who is a person, and how captions name the categories of COCO."""

from __future__ import annotations

import re

_PERSONS = """
actor actress athlete baby batter bicyclist biker boarder boy boyfriend bride businessman businesswoman catcher chef child
clown cop cowboy cyclist dad dancer doctor driver farmer father fireman fisherman friend gentleman girl girlfriend
goalie groom guy human husband individual infant kid lady man mom mother motorcyclist musician nurse officer passenger pedestrian
person player policeman rider runner sailor singer skateboarder skater skier snowboarder soldier spectator student surfer swimmer
teacher teenager toddler tourist umpire waiter waitress walker wife woman worker
"""
PERSONS = frozenset(_PERSONS.split())
IRREGULAR = {"child": "children", "person": "people", "knife": "knives", "mouse": "mice", "calf": "calves", "goose": "geese"}
WITHOUT_PLURAL = frozenset({"sheep", "cattle", "skis", "scissors", "shears", "broccoli", "aircraft", "luggage", "oranges"})

COCO = {
    "bicycle": "bicycle bike",
    "car": "car taxi cab sedan minivan suv jeep",
    "motorcycle": "motorcycle motorbike scooter moped",
    "airplane": "airplane plane aeroplane aircraft jet airliner biplane jetliner",
    "bus": "bus minibus double-decker",
    "train": "train locomotive tram trolley",
    "truck": "truck pickup lorry",
    "boat": "boat ship canoe kayak sailboat yacht ferry rowboat raft",
    "traffic light": "traffic_light stoplight traffic_signal stop_light",
    "fire hydrant": "fire_hydrant hydrant",
    "stop sign": "stop_sign",
    "parking meter": "parking_meter meter",
    "bench": "bench",
    "bird": "bird seagull duck goose pigeon parrot owl hawk eagle ostrich swan gull",
    "cat": "cat kitten kitty",
    "dog": "dog puppy pup poodle terrier",
    "horse": "horse pony foal stallion mare",
    "sheep": "sheep lamb ram ewe",
    "cow": "cow cattle bull calf",
    "elephant": "elephant",
    "bear": "bear grizzly",
    "zebra": "zebra",
    "giraffe": "giraffe",
    "backpack": "backpack knapsack rucksack",
    "umbrella": "umbrella parasol",
    "handbag": "handbag purse",
    "tie": "tie necktie bow_tie bowtie",
    "suitcase": "suitcase luggage",
    "frisbee": "frisbee disc",
    "skis": "skis",
    "snowboard": "snowboard",
    "sports ball": "sports_ball ball soccer_ball tennis_ball volleyball",
    "kite": "kite",
    "baseball bat": "baseball_bat bat",
    "baseball glove": "baseball_glove mitt glove",
    "skateboard": "skateboard skate_board",
    "surfboard": "surfboard surf_board",
    "tennis racket": "tennis_racket racket tennis_racquet racquet",
    "bottle": "bottle",
    "wine glass": "wine_glass wineglass",
    "cup": "cup mug",
    "fork": "fork",
    "knife": "knife",
    "spoon": "spoon",
    "bowl": "bowl",
    "banana": "banana",
    "apple": "apple",
    "sandwich": "sandwich hamburger burger cheeseburger",
    "orange": "oranges",
    "broccoli": "broccoli",
    "carrot": "carrot",
    "hot dog": "hot_dog hotdog",
    "pizza": "pizza",
    "donut": "donut doughnut",
    "cake": "cake cupcake cheesecake",
    "chair": "chair stool armchair",
    "couch": "couch sofa loveseat",
    "potted plant": "potted_plant houseplant plant",
    "bed": "bed",
    "dining table": "dining_table dining_room_table table",
    "toilet": "toilet urinal",
    "tv": "tv television monitor",
    "laptop": "laptop laptop_computer notebook_computer",
    "mouse": "mouse computer_mouse",
    "remote": "remote remote_control",
    "keyboard": "keyboard",
    "cell phone": "cell_phone phone cellphone smartphone mobile_phone",
    "microwave": "microwave microwave_oven",
    "oven": "oven stove",
    "toaster": "toaster toaster_oven",
    "sink": "sink washbasin",
    "refrigerator": "refrigerator fridge",
    "book": "book",
    "clock": "clock",
    "vase": "vase",
    "scissors": "scissors shears",
    "teddy bear": "teddy_bear teddy",
    "hair drier": "hair_drier hair_dryer hairdryer blow_dryer",
    "toothbrush": "toothbrush",
}
"""The words for each category of COCO, "_" for a space; of a person those of ``PERSONS``."""

KIND_OF = (
    "station stop track sign lot park yard shop stand rack house box paper pan board court game match field team cover top lid show mat tag"
)
"""Nouns before which a category's word says what kind, not what: "bus stop", "train track", "toilet paper"."""

_MEASURES = """
back bit bunch closeup couple edge end form front group image kind lot middle number pair photo photograph picture piece row
bunches groups images kinds lots pairs photos pictures pieces rows set shot side sort top type types variety view
"""
MEASURES = frozenset(_MEASURES.split())
"""Nouns before "of" that are not a thing of their own: "a couple of dogs", "the top of the hill"."""


def plural(word: str) -> str:
    """The plural of a noun in lower case; of a compound, that of its last word."""
    if word in WITHOUT_PLURAL:
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("man") and word != "human":
        return f"{word[:-3]}men"
    if re.search(r"[^aeiou]y$", word):
        return f"{word[:-1]}ies"
    return f"{word}es" if re.search(r"(s|x|z|ch|sh)$", word) else f"{word}s"


PEOPLE = PERSONS | {plural(word) for word in PERSONS}
