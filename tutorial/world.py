"""A tiny world that tells stories and asks about them: endless text with exact answers, for training and for measuring.

    story(7).text                      # a short story
    story(7).facts                     # what it states, each with a question and its exact answer
    dialogue(7, questions=3)           # chat messages: a story, then questions and answers
    evaluate(llm)                      # perplexity and answer accuracy of any nanoserve.LLM on unseen stories

Everything follows from a seed and uses only the standard library. A story is opened and closed by one of a few plots;
between them come episodes in which somebody finds, hides, counts, gives or whispers something. Each episode draws its
things from pools that never give the same thing twice, and every fact is *functional* (one value per subject and
relation), so a story cannot contradict itself and every question has exactly one answer.

Lengths and distances are measured in *pieces*: words, single digits and punctuation marks. The tokenizer trained by
train.py spends about one token per piece, so read "pieces" as "tokens" (within about 10 %).
"""

import math
import random
import re
from dataclasses import dataclass, field

# Seeds of training text lie below TRAIN_SEEDS.stop, those of held-out text above. Nothing else keeps the two apart, and
# nothing else is needed: a seed decides every word, and a story has far more possible forms than there are seeds.
TRAIN_SEEDS = range(0, 1_000_000_000)
HELD_OUT_SEEDS = range(1_000_000_000, 2_000_000_000)

GIRLS = "Mia Lily Anna Rosa Ella Nora Ruby Zoe Ivy Clara Emma Lucy".split()
BOYS = "Tom Ben Max Leo Sam Finn Jack Oscar Hugo Noah Theo Adam".split()
PETS = "Pip Dot Momo Pepper Biscuit Waffle Nutmeg Bramble Socks Pebble Tuffy Clover Fern Hazel Juniper Poppy".split()
ANIMALS = "fox rabbit hedgehog duck mouse cat dog frog squirrel bear turtle goose pony badger".split()
COLOURS = "red blue green yellow purple pink white black brown golden silver grey".split()
THINGS = (
    "kite ball key drum boat lantern book bell basket cup map whistle postcard mirror ribbon teapot candle blanket "
    "flute pillow bucket coin ring crown doll robot puzzle spoon clock painting brush compass balloon "
    "trumpet magnet flag necklace wheel"
).split()
ON_STAGE = "drum bell flute trumpet crown mirror robot lantern".split()
HEAVY = "ladder wagon trunk piano sledge statue cart stove crate desk".split()
CLOTHES = "scarf hat coat cap jacket sweater".split()
FOODS = "soup porridge toast honey cheese noodles pie jam rice pudding salad bread".split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()
SECRETS = (
    "moonlight thunder dragon pumpkin velvet rainbow mountain island whisper cinnamon comet pirate willow snowflake "
    "castle waterfall dolphin garnet meteor penguin saffron tulip walnut harvest "
    "lemon tiger rocket hammock sparrow"
).split()
WISHES = [
    "to see the sea", "to fly like a bird", "to ride a whale", "to climb a mountain", "to sleep in a tree",
    "to sail around the world", "to dance in the snow", "to touch a cloud", "to learn a song", "to meet a giant",
]  # fmt: skip
NUMBERED = (
    "gate chest ticket tower train cottage boathouse letter bus tram tent stamp locker barge bottle plate milestone "
    "signpost carriage windmill beehive mailbox"
).split()
COUNTABLES = {  # what can be counted, and how one comes by it: (past, infinitive)
    "apples": ("picked", "pick"), "plums": ("picked", "pick"), "pears": ("picked", "pick"),
    "berries": ("picked", "pick"), "flowers": ("picked", "pick"), "carrots": ("pulled", "pull"),
    "shells": ("collected", "collect"), "stones": ("collected", "collect"), "leaves": ("collected", "collect"),
    "nuts": ("gathered", "gather"), "mushrooms": ("gathered", "gather"), "acorns": ("gathered", "gather"),
    "feathers": ("gathered", "gather"), "pinecones": ("gathered", "gather"),
    "marbles": ("won", "win"), "daisies": ("picked", "pick"),
}  # fmt: skip
OUTDOORS = [
    "in the garden", "in the forest", "in the meadow", "in the park", "in the orchard", "in the valley",
    "at the harbour", "at the farm", "on the beach", "on the hill", "on the bridge", "by the river", "by the lake",
    "by the lighthouse", "by the well", "by the pond",
]  # fmt: skip
INDOORS = ["in the barn", "in the library", "in the kitchen", "in the attic", "at the market", "at the school",
           "at the mill", "in the cellar"]  # fmt: skip
PLACES = OUTDOORS + INDOORS
SPOTS = [
    "under the bed", "behind the door", "inside the cupboard", "under the stairs", "behind the curtain",
    "under the table", "behind the sofa", "on the shelf", "inside the boot", "under the rug", "inside the drawer",
    "on the roof", "behind the barrel", "under the bench", "inside the hollow log", "behind the big stone",
]  # fmt: skip
GETTING = [("found", "find"), ("made", "make"), ("bought", "buy"), ("discovered", "discover"), ("chose", "choose")]
NATURE = [
    "The wind sang softly in the trees.", "A bee hummed a sleepy tune.", "The clouds looked like sheep.",
    "Somewhere a bird was singing.", "The grass smelled of summer.", "The sun was warm and friendly.",
    "A butterfly danced by.", "Far away a cow said moo.", "Soft rain began to fall, and soon it stopped again.",
    "The leaves whispered to each other.", "Everything was quiet for a while.", "The air smelled of fresh bread.",
]  # fmt: skip


CONNECTIVES = ["Then", "After that,", "A little later,", "Before long,", "Next,", "Soon", "Later,", "So", "One day",
               "One sunny day"]  # fmt: skip


def size(text):
    """Length of `text` in pieces (words, digits, punctuation marks), which is close to its number of tokens."""
    return len(re.findall(r"[^\W\d]+|\d|[^\w\s]", text))


@dataclass
class Fact:
    """One thing a story states: `relation` of `subject` is `value`; `end` is where (characters) it was last stated."""

    kind: str  # who, what, where, colour, count, sum, key
    subject: str
    relation: str
    value: str
    question: str
    answer: str = ""  # the sentence that states it, in the story's own words, unless given
    end: int = -1


@dataclass
class Line:
    """A sentence or two, and the facts they state (or state once more).

    An answer repeats the sentence that states its fact, so answering is to find the sentence and to copy it. That is
    the one thing (an "induction head") that a model of this size learns well, and what a broken cache breaks first.
    """

    text: str
    facts: list = field(default_factory=list)

    def __post_init__(self):
        for fact in self.facts:
            if not fact.answer:
                sentence = next(x for x in re.split(r"(?<=[.!?]) ", self.text) if fact.value.removeprefix("a ") in x)
                sentence = re.sub(rf"^({'|'.join(CONNECTIVES)}) ", "", sentence)
                fact.answer = sentence[0].upper() + sentence[1:]


@dataclass
class Character:
    name: str
    kind: str  # "girl", "boy" or an animal

    def __str__(self):
        return self.name


@dataclass
class Story:
    text: str
    facts: list  # of Fact, in the order in which they were first stated
    cast: list  # of Character, the hero first
    place: str  # where the hero lives
    missing: list  # (question, "I don't know.") pairs about things that the story never mentions

    def distance(self, fact):
        """Pieces between the sentence that last states `fact` and the end of the story."""
        return size(self.text[fact.end :])


# ---- telling ---------------------------------------------------------------------------------------------------------


class Teller:
    """What an episode may use: the cast, the pools (each item is drawn once per story), things seen so far."""

    def __init__(self, rng, avoid=()):
        self.rng = rng
        pools = dict(girl=GIRLS, boy=BOYS, pet=PETS, animal=ANIMALS, thing=THINGS, heavy=HEAVY, clothes=CLOTHES,
                     food=FOODS, secret=SECRETS, wish=WISHES, numbered=NUMBERED, countable=COUNTABLES, spot=SPOTS,
                     nature=NATURE, digits=[f"{tens}{rng.randrange(10)}" for tens in range(1, 10)])  # fmt: skip
        self.pools = {name: [item for item in pool if item not in avoid] for name, pool in pools.items()}
        for pool in self.pools.values():
            rng.shuffle(pool)
        self.said = set()  # (who, verb) pairs already used, so that "What did Mia find?" has one answer
        self.coloured = []  # facts about colours told so far: what a later sentence may mention again
        self.cast = []
        for _ in range(rng.choice((2, 2, 3))):
            kind = rng.choice(("girl", "boy", "girl", "boy", "pet"))
            name = self.draw(kind)
            self.cast.append(Character(name, self.draw("animal") if kind == "pet" else kind))

    def draw(self, pool, among=None):
        """Something this story has not used yet. Raises IndexError when there is none (the episode is dropped)."""
        pool = self.pools[pool]
        return pool.pop(-1 if among is None else [item in among for item in pool].index(True))

    def place(self, places=PLACES):
        return self.rng.choice(places)

    def number(self, low=2, high=9):
        return self.rng.randint(low, high)

    def two(self):
        """Two different members of the cast."""
        return self.rng.sample(self.cast, 2)

    def once(self, *key):
        """Claims a (who, verb) pair. Raises IndexError when it was used before."""
        if key in self.said:
            raise IndexError(key)
        self.said.add(key)

    def then(self):
        return self.rng.choice(CONNECTIVES[:7])

    def colour(self, thing, owner=None):
        """Gives `thing` a colour: the sentence that says so."""
        subject = f"{owner}'s {thing}" if owner else f"the {thing}"
        colour = self.rng.choice(COLOURS)
        return Line(f"{subject[0].upper()}{subject[1:]} was {colour}.",
                    [Fact("colour", subject, "colour", colour, f"What colour was {subject}?")])  # fmt: skip

    def cheer(self, thing):
        """A friendly remark about a thing. It states nothing that could be asked."""
        a, b = self.two()
        return Line(self.rng.choice((
            f'"What a lovely {thing}!" said {a}.', f'"May I hold the {thing}?" asked {a}, and {b} laughed.',
            f"{a} clapped and {b} danced with joy.", f"{a} and {b} could not stop smiling.",
            f'"I have never seen such a fine {thing}," said {a}.', f'"Hooray!" cried {a} and {b} together.',
        )))  # fmt: skip


# Episodes. Each draws what it needs first (so that a dry pool drops it as a whole) and returns its lines. Sentences put
# the value last, after the words by which a question will refer to it: what a causal model copies, it must be able to
# recognize when it reads the value, and it has only read what stands to the left.


def getting(t):
    (a, b), (past, verb), thing, place = t.two(), t.rng.choice(GETTING), t.draw("thing"), t.place()
    t.once(a.name, past)
    owner = t.rng.choice((a, b)).name
    return [
        Line(f"{t.then()} {a} {past} a {thing} {place}.", [
            Fact("what", a.name, past, f"a {thing}", f"What did {a} {verb}?"),
            Fact("where", f"the {thing}", f"{past} where", place, f"Where did {a} {verb} the {thing}?"),
        ]),
        t.colour(thing), t.cheer(thing),
        Line(f"From then on the {thing} belonged to {owner}.",
             [Fact("who", f"the {thing}", "belonged to", owner, f"Who did the {thing} belong to?")]),
    ]  # fmt: skip


def hiding(t):
    (a, b), thing, spot = t.two(), t.draw("thing"), t.draw("spot")
    tail = t.rng.choice((f"{b} searched for a long time and laughed.", "Nobody saw it. It was a good trick.",
                         f'"You will never guess where it is," {a} told {b}.'))  # fmt: skip
    return [
        Line(f"{t.then()} they played a game with a {thing}. The {thing} was hidden by {a} {spot}.", [
            Fact("who", f"the {thing}", "hidden by", a.name, f"Who hid the {thing}?"),
            Fact("where", f"the {thing}", "hidden where", spot, f"Where did {a} hide the {thing}?"),
        ]),
        Line(tail),
    ]  # fmt: skip


def moving(t):
    (a, b), thing, (first, last) = t.two(), t.draw("heavy"), t.rng.sample(PLACES, 2)
    there = "to " + last.split(" ", 1)[1]
    return [
        Line(f"There was a heavy {thing} {first}.",
             [Fact("where", f"the {thing}", "at first", first, f"Where was the {thing} at first?")]),
        Line(f'"It should not stay here," said {b}. So the {thing} was moved by {a} {there}.', [
            Fact("who", f"the {thing}", "moved by", a.name, f"Who moved the {thing}?"),
            Fact("where", f"the {thing}", "in the end", there, f"Where was the {thing} in the end?"),
        ]),
    ]  # fmt: skip


def counting(t):
    (a, b), noun, n, place = t.two(), t.draw("countable"), t.number(), t.place(OUTDOORS)
    past, verb = COUNTABLES[noun]
    return [
        Line(f"{t.then()} {a} {past} {noun} {place}.",
             [Fact("where", f"the {noun}", f"{past} where", place, f"Where did {a} {verb} the {noun}?")]),
        Line(f"The number of {noun} was {NUMBERS[n]}.",
             [Fact("count", f"{a}'s {noun}", past, NUMBERS[n], f"How many {noun} did {a} {verb}?")]),
        Line(t.rng.choice((f"{b} counted the {noun} twice.", f'"So many {noun}!" said {b}.',
                           f"{a} was very proud of the {noun}."))),
    ]  # fmt: skip


def adding(t):
    (a, b), noun, n, m = t.two(), t.draw("countable"), t.number(2, 5), t.number(2, 4)
    first = f"{a} had {noun}, {NUMBERS[n]} of them."
    second = f"More {noun} came from {b}, {NUMBERS[m]} of them."
    total = f"{first} {second} That makes {NUMBERS[n + m]}."  # shows the working: look up, look up, add
    return [
        Line(f"{t.then()} {first}",
             [Fact("count", f"{a}'s {noun}", "at first", NUMBERS[n], f"How many {noun} did {a} have at first?")]),
        Line(second, [
            Fact("sum", f"{a}'s {noun}", "in the end", NUMBERS[n + m], f"How many {noun} did {a} have in the end?",
                 total),
            Fact("who", f"{a}'s {noun}", "given by", b.name, f"Who did more {noun} come from?"),
        ]),
        Line(t.rng.choice((f'"Thank you, {b}!" said {a}.', f'"Friends share," said {b}.',
                           f"{a} gave {b} a big hug."))),
    ]  # fmt: skip


def whispering(t):
    (a, b), word = t.two(), t.draw("secret")
    t.once(a.name, "secret")
    return [
        Line(f"{t.then()} {a} told {b} a secret, very quietly."),
        Line(f"{a}'s secret word was {word}.",
             [Fact("key", a.name, "secret word", word, f"What was {a}'s secret word?")]),
        Line(t.rng.choice((f'"I will never tell anyone," said {b}.', f"{b} promised to remember it."))),
    ]  # fmt: skip


def reading_number(t):
    (a, b), thing, digits = t.two(), t.draw("numbered"), t.draw("digits")
    return [
        Line(f"{t.then()} {a} and {b} saw a strange old {thing}. The number on the {thing} was {digits}.",
             [Fact("key", f"the {thing}", "number", digits, f"What was the number on the {thing}?")]),
        Line(t.rng.choice((f"{a} wrote it down.", f'"What could it mean?" asked {b}.', f"{b} read it out loud."))),
    ]  # fmt: skip


def giving(t):
    (a, b), thing = t.two(), t.draw("thing")
    t.once(a.name, b.name, "gave")
    return [
        Line(f"{t.then()} {a} gave {b} a {thing}.",
             [Fact("what", f"{a} to {b}", "gift", f"a {thing}", f"What did {a} give {b}?")]),
        t.colour(thing), Line(f'"Thank you, {a}! I will take good care of it," said {b}.'),
    ]  # fmt: skip


def eating(t):
    (a, b), food = t.two(), t.draw("food")
    t.once(a.name, "food")
    return [
        Line(t.rng.choice((f"{t.then()} they were all very hungry.", f"{t.then()} it was time for lunch."))),
        Line(f"{a}'s favourite food was {food}.",
             [Fact("what", a.name, "favourite food", food, f"What was {a}'s favourite food?")]),
        Line(f"{b} cooked a big pot of it, and nothing was left." if food in ("soup", "porridge", "noodles", "rice")
             else f"{b} brought some of it, and nothing was left."),
    ]  # fmt: skip


def meeting(t):
    (a, b), kind, name, thing = t.two(), t.draw("animal"), t.draw("pet"), t.draw("thing")
    place, spot = t.place(), t.draw("spot")
    return [
        Line(f"{t.then()} they met {name}, a {kind}, {place}.", [
            Fact("what", name, "animal", f"a {kind}", f"What animal was {name}?", f"{name} was a {kind}."),
            Fact("where", name, "met", place, f"Where did they meet {name}?"),
        ]),
        Line(f"{name} was sad and looking for a {thing}.",
             [Fact("what", name, "looking for", f"a {thing}", f"What was {name} looking for?")]),
        Line(f"{a} and {b} helped."),
        Line(f"At last the {thing} was seen by {b} {spot}.", [
            Fact("who", f"the {thing}", "seen by", b.name, f"Who saw the {thing}?"),
            Fact("where", f"the {thing}", "seen", spot, f"Where did {b} see the {thing}?"),
        ]),
        Line(f'"Thank you!" cried {name} and ran home happily.'),
    ]  # fmt: skip


def racing(t):
    (a, b), place = t.two(), t.place()
    goal = place.split(" ", 1)[1]
    t.once("race", goal)
    return [
        Line(f"{t.then()} they ran a race to {goal}. The winner of the race to {goal} was {a}.",
             [Fact("who", f"the race to {goal}", "winner", a.name, f"Who was the winner of the race to {goal}?")]),
        Line(t.rng.choice((f'"You are fast!" said {b}.', f"{b} was a good loser and clapped."))),
    ]  # fmt: skip


def wishing(t):
    (a, b), wish = t.two(), t.draw("wish")
    t.once(a.name, "wish")
    return [
        Line(f"{t.then()} {a} and {b} lay in the grass and talked."),
        Line(f"{a}'s dearest wish was {wish}.",
             [Fact("what", a.name, "dearest wish", wish, f"What was {a}'s dearest wish?")]),
        Line(t.rng.choice((f'"One day we will do it," said {b}.', f'"That is a beautiful wish," said {b}.'))),
    ]  # fmt: skip


def dressing(t):
    (a, b), thing = t.two(), t.draw("clothes")
    return [
        Line(f"{t.then()} the wind grew cold. A warm {thing} was worn by {a}.",
             [Fact("who", f"the {thing}", "worn by", a.name, f"Who wore the {thing}?")]),
        t.colour(thing), Line(f'"It looks very nice on you," said {b}.'),
    ]  # fmt: skip


def resting(t):
    a, b = t.two()
    return [Line(t.draw("nature")), Line(t.rng.choice((f"{a} and {b} sat down for a rest.",
                                                       f"{a} hummed a song, and {b} hummed along.")))]  # fmt: skip


def remembering(t):
    """Mentions something again. It teaches a model that tells stories to keep to what it has said."""
    a, _ = t.two()
    fact = t.rng.choice(t.coloured)
    colour, thing = fact.value, fact.subject.removeprefix("the ")
    return [Line(t.rng.choice((f"{t.then()} {a} looked at the {colour} {thing} again and smiled.",
                               f'"I still like the {colour} {thing} best," said {a}.')), [fact])]  # fmt: skip


EPISODES = [getting, getting, hiding, moving, counting, counting, adding, adding, whispering, reading_number,
            reading_number, giving, eating, meeting, racing, wishing, dressing, resting, remembering]  # fmt: skip


# Plots. Each returns the lines that open and the lines that close a story.


def plot_lost(t):
    (a, b), thing, spot = t.two(), t.draw("thing"), t.draw("spot")
    colour = t.colour(thing, a)
    return [
        Line(f"One morning {a} was sad, because {a}'s {thing} was lost."), colour,
        Line(f'"Do not worry, we will look for it together," said {b}.'),
    ], [
        Line(f"At last {b} had an idea. {a}'s lost {thing} was {spot}.",
             [Fact("where", f"{a}'s {thing}", "lost", spot, f"Where was {a}'s lost {thing}?")]),
        Line(f"{a} hugged the {colour.facts[0].value} {thing} and never lost it again.", colour.facts),
    ]  # fmt: skip


def plot_birthday(t):
    (a, b), thing = t.two(), t.draw("thing")
    t.once(a.name, b.name, "gave")
    return [
        Line(f"Everybody was excited. It was the birthday of {b}.",
             [Fact("who", "the birthday", "of", b.name, "Whose birthday was it?")]),
        Line(f"{a} had a present for {b}, wrapped in soft paper."),
    ], [
        Line(f"Then {b} opened the birthday present. The present was a {thing}.",
             [Fact("what", "the present", "content", f"a {thing}", "What was the present?")]),
        t.colour(thing), Line(f'"It is just what I wanted!" said {b}, and everybody sang.'),
    ]  # fmt: skip


def plot_door(t):
    (a, b), thing, place, digits = t.two(), t.draw("thing"), t.place(), t.draw("digits")
    number = Fact("key", "the little door", "number", digits, "What was the number of the little door?")
    return [
        Line(f"{a} and {b} knew a little door {place}. It was always locked.",
             [Fact("where", "the little door", "place", place, "Where was the little door?")]),
        Line(f"The number of the little door was {digits}.", [number]),
        Line(f'"One day we will open it," said {a}. But first they went out to play.'),
    ], [
        Line(f"In the evening they went back to the little door. {b} turned the lock to {digits}, and it opened!",
             [number]),
        Line(f"Behind the little door was a {thing}.",
             [Fact("what", "the little door", "behind", f"a {thing}", "What was behind the little door?")]),
        Line("They kept it as their treasure."),
    ]  # fmt: skip


def plot_picnic(t):
    (a, b), place, food = t.two(), t.place(OUTDOORS), t.draw("food")
    return [
        Line(f"One sunny day {a} and {b} planned a picnic {place}.",
             [Fact("where", "the picnic", "place", place, "Where was the picnic?")]),
        Line(f"{a} brought {food} for the picnic.",
             [Fact("what", "the picnic", "food", food, f"What did {a} bring for the picnic?")]),
    ], [
        Line(f"When they came to the picnic {place}, they ate {food} until their tummies were full."),
        Line("It was the best picnic ever."),
    ]  # fmt: skip


def plot_bird(t):
    (a, b), place, word = t.two(), t.place(OUTDOORS), t.draw("nature")
    return [
        Line(f"One day a tiny bird was seen by {a} {place}.", [
            Fact("where", "the tiny bird", "place", place, f"Where did {a} see the tiny bird?"),
            Fact("who", "the tiny bird", "seen by", a.name, "Who saw the tiny bird?")]),
        Line(f'The bird could not sing. "We must cheer it up," said {b}.'),
    ], [
        Line(f"{word} Then the tiny bird opened its beak and sang the sweetest song."),
        Line(f"{a} and {b} listened, and their hearts were light."),
    ]  # fmt: skip


def plot_show(t):
    (a, b), place, thing = t.two(), t.place(), t.draw("thing", among=ON_STAGE)
    part = Fact("what", a.name, "part in the show", f"a {thing}", f"What did {a} need for the show?")
    return [
        Line(f"{a} and {b} wanted to put on a show {place}.",
             [Fact("where", "the show", "place", place, "Where was the show?")]),
        Line(f"For the show {a} needed a {thing}.", [part]),
        Line(f'"It will be wonderful," said {b}.'),
    ], [
        Line(f"In the evening the show began. {a} bowed with the {thing}, and everybody clapped and clapped.", [part]),
    ]  # fmt: skip


def plot_raft(t):
    (a, b), place = t.two(), t.place(["on the beach", "by the river", "by the lake", "by the pond"])
    animal, name = t.draw("animal"), t.draw("pet")
    return [
        Line(f"The plan to build a raft came from {a}.",
             [Fact("who", "the raft", "planned by", a.name, "Who did the plan to build a raft come from?")]),
        Line(f"The raft lay {place}. It was not ready yet.",
             [Fact("where", "the raft", "place", place, "Where was the raft?")]),
        Line(f'"We will sail far away," {a} told {b}.'),
    ], [
        Line("When the raft was ready, they sailed to a tiny island."),
        Line(f"On the tiny island lived {name}, an old {animal}.",
             [Fact("what", name, "animal", f"a {animal}", f"What animal was {name}?", f"{name} was a {animal}."),
              Fact("who", "the island", "home of", name, "Who lived on the tiny island?")]),
        Line(f"{name} was glad to have guests and told them stories of the sea."),
    ]  # fmt: skip


def plot_cake(t):
    (a, b), n, food = t.two(), t.number(2, 9), t.draw("food", among=["honey", "jam", "cheese", "pudding"])
    return [
        Line(f"{a} wanted to bake a cake for {b}.",
             [Fact("who", "the cake", "for", b.name, "Who was the cake for?")]),
        Line(f"The cake needed {NUMBERS[n]} eggs.",
             [Fact("count", "the cake", "eggs", NUMBERS[n], "How many eggs did the cake need?")]),
        Line(f"On top of the cake there would be {food}.",
             [Fact("what", "the cake", "top", food, "What would be on top of the cake?")]),
    ], [
        Line(f"At last the cake came out of the oven, with {food} on top. The whole house smelled sweet."),
        Line(f'"This is the best cake in the world," said {b}, and everybody had a big piece.'),
    ]  # fmt: skip


PLOTS = [plot_lost, plot_birthday, plot_door, plot_picnic, plot_bird, plot_show, plot_raft, plot_cake]
OPENINGS = [
    "Once upon a time there was", "Once upon a time there lived", "Once upon a time there was",
    "Once upon a time there was", "Long ago there was", "This is the story of",
    "Far away, behind seven hills, there lived",
]  # fmt: skip
ENDINGS = [
    "And they all lived happily ever after.", "That night they all slept very well.", "What a day it had been!",
    "Then the stars came out, and everybody went home.", "And they stayed friends forever.",
    "They walked home hand in hand. The end.", "And when they were old, they still talked about that day.",
    "Good friends make every day a good day.",
]  # fmt: skip


def introduce(t, place):
    """Names the cast. Everybody is called by name from here on, so no pronoun is ever ambiguous."""
    a, b, *rest = t.cast
    mood = t.rng.choice(("little", "kind", "brave", "clever", "cheerful", "curious"))
    lines = [
        Line(f"{t.rng.choice(OPENINGS)} {a}, a {mood} {a.kind}."),
        Line(f"{a} lived {place}.", [Fact("where", a.name, "home", place, f"Where did {a} live?")]),
        Line(f"{a}'s best friend was {b}, a {b.kind}.",
             [Fact("who", a.name, "best friend", b.name, f"Who was {a}'s best friend?")]),
        *(Line(f"There was also {c}, a {c.kind}, who liked to come along.") for c in rest),
    ]
    for c, line in zip(t.cast, lines[:1] + lines[2:], strict=True):
        if c.kind not in ("girl", "boy"):
            answer = f"{c} was a {c.kind}."
            line.facts.append(Fact("what", c.name, "animal", f"a {c.kind}", f"What animal was {c}?", answer))
    return lines


def story(seed, length=200, avoid=()):
    """The story of `seed`: at most `length` pieces (up to 145 when that is less), usually 10 less. Under 110 pieces
    there is no room for a plot, only for an episode.

    `avoid`: words (names, things, ...) that it must not use, so that two stories in one conversation stay apart.
    """
    rng = random.Random(f"story {seed}")
    t = Teller(rng, set(avoid))
    home = t.place([p for p in OUTDOORS if "bridge" not in p])
    opening, closing = rng.choice(PLOTS)(t) if length >= 110 else ([], [])
    opening = introduce(t, home) + opening
    closing = closing + [Line(rng.choice(ENDINGS))]
    room = length - sum(size(line.text) for line in opening + closing)
    paragraphs, misses, last = [opening], 0, None
    while misses < 8:  # tell episodes until several in a row find no room or no unused things
        episode = rng.choice(EPISODES)
        try:
            lines = episode(t) if episode is not last else None
        except IndexError:
            lines = None
        need = sum(size(line.text) for line in lines) if lines else math.inf
        if need > room:
            misses += 1
            continue
        room, misses, last = room - need, 0, episode
        t.coloured += [f for line in lines for f in line.facts if f.kind == "colour" and f not in t.coloured]
        if len(paragraphs) == 1 or len(paragraphs[-1]) > 6:
            paragraphs.append([])
        paragraphs[-1].extend(lines)
    paragraphs.append(closing)

    text, facts = "", []
    for paragraph in paragraphs:
        text += "\n" if text else ""
        for i, line in enumerate(paragraph):
            text += (" " if i else "") + line.text
            for fact in line.facts:
                fact.end = len(text)
                if fact not in facts:
                    facts.append(fact)
    keys = {(fact.subject, fact.relation) for fact in facts}
    assert len(keys) == len(facts) == len({fact.question for fact in facts}), (seed, length)
    return Story(text, facts, t.cast, home, missing_questions(t))


def missing_questions(t):
    """Questions about things that the story never mentions."""
    ask = []
    a = t.cast[0]
    for thing in t.pools["thing"][:3]:
        ask += [f"What colour was the {thing}?", f"Who did the {thing} belong to?", f"Where did {a} hide the {thing}?"]
    for noun in t.pools["countable"][:2]:
        ask.append(f"How many {noun} did {a} {COUNTABLES[noun][1]}?")
    for name in t.pools["girl"][:1] + t.pools["boy"][:1]:
        ask += [f"What was {name}'s secret word?", f"Where did {name} live?"]
    t.rng.shuffle(ask)
    return [(question, "I don't know.") for question in ask]


# ---- talking ---------------------------------------------------------------------------------------------------------

SMALL_TALK = [
    (("Hello!", "Hi!", "Good morning!", "Hello there."),
     ("Hello! Shall I tell you a story?", "Hi! I know many little stories.", "Hello! It is nice to meet you.")),
    (("Who are you?", "What is your name?", "What are you?"),
     ("I am a very small language model. I tell little stories.",)),
    (("How are you?", "How are you today?"), ("I am fine, thank you. Shall I tell you a story?",)),
    (("What can you do?", "Can you help me?"), ("I can tell you a story and answer questions about it.",)),
]  # fmt: skip
GOODBYE = [
    (("Thank you!", "Thanks!", "That was nice."), ("You are welcome!",)),
    (("Goodbye!", "Bye!", "Good night!"), ("Goodbye! Come back soon.",)),
]  # fmt: skip
SYSTEM = ["You are a friendly storyteller.", "You tell short stories and answer questions about them.", "Be brief."]
PAGE = 400  # pieces: a story above it is "a long story"
HEARD = ["What a nice story!", "Thank you for the story.", "I like this story."]


def request(rng, tale):
    """How a user asks for `tale`. Who wants more than a page says so: left alone, the model keeps its stories short."""
    a, b = tale.cast[0], tale.cast[1]
    hero = f"a {a.kind}" if a.kind not in ("girl", "boy") or rng.random() < 0.3 else a.name
    topic = rng.choice(("", f" about {hero}", f" about {hero}", f" about {hero} {tale.place}", f" about {a} and {b}"))
    long = "long " if size(tale.text) > PAGE else ""
    ask = rng.choice(("Tell me a {}story{}.", "Please tell me a {}story{}.", "Can you tell me a {}story{}?"))
    return ask.format(long, topic)


def dialogue(seed, length=200, questions=4, near=0, far=math.inf, budget=math.inf, stories=1, extras=True):
    """Chat messages `[{"role": ..., "content": ...}, ...]`: a story of at most `length` pieces, then questions on it.

    The distance from the sentence that states a fact to the end of its question lies in [near, far] pieces (short
    questions and answers in between count as well). `budget` bounds the whole conversation, in pieces. With
    `stories=2` a second story with other characters and things follows. `extras=False` leaves out greetings and
    questions that have no answer.
    """
    rng = random.Random(f"dialogue {seed}")
    messages, used = [], 0

    def say(role, content):
        nonlocal used
        messages.append({"role": role, "content": content})
        used += size(content) + 2  # the role token and <|end|>

    if extras and rng.random() < 0.2:
        say("system", rng.choice(SYSTEM))
    if extras and rng.random() < 0.2:
        for ask, reply in rng.sample(SMALL_TALK, rng.randint(1, 2)):
            say("user", rng.choice(ask))
            say("assistant", rng.choice(reply))
    seen = ()
    for part in range(stories):
        tale = story(f"{seed} {part}" if part else seed, length, avoid=seen)
        seen = set(re.findall(r"\w+", tale.text)) - {"in", "to"}
        told, pending, mark = rng.random(), "", None  # mark: `used` where the story ended
        if told < 0.5:  # the model tells the story
            say("user", request(rng, tale))
            say("assistant", tale.text)
            mark = used
        elif told < 0.8:  # the user tells it
            say("user", tale.text)
            mark = used
            say("assistant", rng.choice(HEARD))
        else:  # the story and the first question are one message, as in retrieval
            pending = f"Listen to this story.\n{tale.text}\n"
        facts = rng.sample(tale.facts, len(tale.facts))
        missing = list(tale.missing) if extras else []
        asked = 0
        while asked < questions:
            question, answer = None, None
            if missing and rng.random() < 0.05:
                question, answer = missing.pop()
            else:
                gap = 0 if mark is None else used - mark
                for i, fact in enumerate(facts):
                    if near <= tale.distance(fact) + gap + size(fact.question) <= far:
                        question, answer = fact.question, facts.pop(i).answer
                        break
            if question is None or used + size(pending + question) + size(answer) + 4 > budget:
                break
            say("user", pending + question)
            mark, pending = used - size(question) if mark is None else mark, ""
            say("assistant", answer)
            asked += 1
    if extras and rng.random() < 0.1 and used + 16 < budget:
        ask, reply = rng.choice(GOODBYE)
        say("user", rng.choice(ask))
        say("assistant", rng.choice(reply))
    return messages


def echo(seed, budget):
    """Chat messages in which the assistant repeats random words. Every word must be copied, so this is where a model
    learns soonest to look back (in stories most words can be guessed); answering questions then builds on that."""
    rng = random.Random(f"echo {seed}")
    words = GIRLS + BOYS + PETS + ANIMALS + THINGS + COLOURS + NUMBERS + SECRETS + list("0123456789")
    messages = []
    while True:
        text = " ".join(rng.choice(words) for _ in range(rng.randint(3, 24)))
        if budget - sum(size(m["content"]) + 2 for m in messages) < 2 * size(text) + 8:
            return messages
        messages += [{"role": "user", "content": f"Say after me: {text}"}, {"role": "assistant", "content": text}]


# ---- measuring -------------------------------------------------------------------------------------------------------

NEAR, FAR = (0, 300), (301, 900)  # pieces between a fact and the end of the question about it


def exam(stories=40, questions=5, distance=NEAR, seed=HELD_OUT_SEEDS.start):
    """Unseen questions: a list of (messages that end with a question, answer, kind). Each has its own prompt."""
    low, high = distance
    items = []
    for i in range(stories):
        rng = random.Random(f"exam {seed + i} {low}")
        # Stories reach a little beyond the wanted distance, so that facts lie all over the allowed range.
        tale = story(seed + i, rng.randint(110, high - 20) if low == 0 else rng.randint(low + 250, high))
        facts = [f for f in tale.facts if low <= tale.distance(f) + size(f.question) + 8 <= high]
        for fact in rng.sample(facts, min(questions, len(facts))):
            ask = [{"role": "user", "content": fact.question}]
            told = [{"role": "user", "content": request(rng, tale)}, {"role": "assistant", "content": tale.text}]
            items.append((told + ask, fact.answer, fact.kind))
    return items


def evaluate(llm, stories=40, questions=5, seed=HELD_OUT_SEEDS.start, params=None):
    """Quality of any `nanoserve.LLM` on text it has not been trained on.

    Returns a dict: `perplexity` (per token, plain stories of about 200 tokens), `near` and `far` (share of answers that
    are exactly right, facts up to 300 and 301 to 900 tokens back), their counts `near_count`, `far_count`, and
    `kinds`: {kind: (near share, far share)}. `params`: a function that makes SamplingParams from keyword arguments
    (default: the nanoserve class).
    """
    if params is None:
        from nanoserve import SamplingParams as params
    texts = [story(seed + 500_000 + i).text for i in range(stories)]
    outputs = llm.generate([llm.tokenizer.encode(text) for text in texts],
                           params(max_tokens=1, temperature=0, prompt_logprobs=0))  # fmt: skip
    logprobs = [entry[token] for out in outputs
                for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)]  # fmt: skip
    result = {"perplexity": math.exp(-sum(logprobs) / len(logprobs)), "tokens": len(logprobs)}
    kinds = {}
    for name, distance in (("near", NEAR), ("far", FAR)):
        items = exam(stories, questions, distance, seed)
        prompts = [llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages, _, _ in items]
        outputs = llm.generate(prompts, params(max_tokens=40, temperature=0))
        right = [out.text.strip() == answer for out, (_, answer, _) in zip(outputs, items, strict=True)]
        result[name], result[name + "_count"] = sum(right) / len(right), len(right)
        for ok, (_, _, kind) in zip(right, items, strict=True):
            kinds.setdefault(kind, {}).setdefault(name, []).append(ok)
    result["kinds"] = {kind: tuple(sum(x) / len(x) if x else math.nan for x in (v.get("near"), v.get("far")))
                       for kind, v in sorted(kinds.items())}  # fmt: skip
    return result


if __name__ == "__main__":
    import sys

    print(story(int(sys.argv[1]) if len(sys.argv) > 1 else 1, int(sys.argv[2]) if len(sys.argv) > 2 else 200).text)
