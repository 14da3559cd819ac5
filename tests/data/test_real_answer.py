"""The gate of the instructions: nonsense of many kinds scores 0, plain good answers score 1."""

import pytest

from data.checks import (
    GATES,
    asked_checks,
    in_sentences,
    is_english,
    on_topic,
    own_words,
    passed,
    score,
)
from data.prompts import load_prompts

ROWS = load_prompts()


def row_of(start):
    return next(row for row in ROWS if row["prompt"].casefold().startswith(start.casefold()))


BEES = "describe honey bees to a child"  # answer in a few lowercase words
ATTACKS = [  # (kind, prompt, completion)
    ("nothing", BEES, ""),
    ("white space", BEES, " \n "),
    ("marks", BEES, "..."),
    ("emojis", BEES, "🐝🐝🐝 🐝"),
    ("one word of the topic", BEES, "bees"),
    ("two words of the topic", BEES, "honey bees"),
    ("too short a sentence", BEES, "bees make honey."),
    ("a word again and again", BEES, "bees bees bees bees"),
    ("a longer loop", BEES, "bees make honey bees make honey bees make honey"),
    ("a string again and again", BEES, "bzzbzzbzzbzzbzzbzzbzzbzzbzz honey"),
    ("the prompt", BEES, "describe honey bees to a child. answer in a few lowercase words."),
    ("the subject of the prompt", BEES, "honey bees to a child"),
    ("the instruction", BEES, "answer in a few lowercase words about honey bees"),
    ("the prompt in another order", BEES, "to a child describe bees and honey in lowercase words"),
    ("the prompt as a question", BEES, "what are honey bees to a child? what are bees?"),
    ("the prompt twice", BEES, "honey bees to a child. honey bees to a child. ok"),
    ("a promise", BEES, "ok. i will describe honey bees to a child in a few lowercase words."),
    ("an announcement", BEES, "sure, here is the description of honey bees for a child"),
    ("a refusal", BEES, "i am sorry, i cannot describe honey bees."),
    ("about the form", BEES, "this is a description of honey bees in lowercase words."),
    ("the topic as itself", BEES, "honey bees are honey bees."),
    ("key words in a row", BEES, "bees honey hive sweet flower garden"),
    ("key words with commas", BEES, "bees, honey, hive, flowers, sweet"),
    ("key words with strokes", BEES, "bees/honey/hive/wax/flower/garden/sting"),
    ("key words run together", BEES, "beeshoneyhivewaxflower buzzing"),
    ("invented words", BEES, "bees zxqv blorp fnord grumpf wibble"),
    ("invented words in a sentence", BEES, "the blorp of a fnord makes zxqv in the honey mimsy hive of glorks"),
    ("keys of a keyboard", BEES, "asdf jkl qwer bees zxcv uiop"),
    ("fake Latin", BEES, "lorem ipsum dolor sit amet bees consectetur"),
    ("letters apart", BEES, "b e e s m a k e h o n e y"),
    ("written backwards", BEES, "eebs ekam yenoh ni a evih bees"),
    ("another language", BEES, "les abeilles bees produisent du miel doux"),
    ("word salad", BEES, "the bees the of and a is to honey garden flower the in"),
    ("counting", BEES, "bee 1 2 3 4 5 6 7"),
    ("fragments", BEES, "plei-el-oof bees"),
    ("off topic", BEES, "the weather is nice today and i like tea."),
    ("an excuse", BEES, "no no no, it is too hard."),
    ("the word that must be there", "Explain what a key is for", "velvet"),
    ("that word in the prompt", "Explain what a key is for", "Explain what a velvet key is for."),
    ("a form without content", "How should I store potatoes?", "I should store potatoes (parentheses)."),
    ("the prompt in capitals", "Why are libraries important?", "WHY ARE LIBRARIES IMPORTANT? EVERY LETTER A CAPITAL."),
    ("the topic in capitals", "Why are libraries important?", "LIBRARIES"),
    ("a list of the prompt's words", "List some sauces for noodles", "Noodles, sauces, noodles, some sauces."),
    ("a fragment that fits the form", "Write a postcard from the mountains", "Mountain of Eternal."),
    ("a short form off topic", "Why do people love horses?", "The Jaws."),
    ("one invented word", "Why do people love horses?", "HAPPPINEMINI"),
    ("the question as an answer", "Why do people love horses?", "Horses people love, people horses love."),
]
GOOD = [
    ("How should I store potatoes?", "Keep them in a cool, dark place (a cellar is best)."),
    ("Describe a soft blanket.", "It is warm, fluffy and perfect for a cold night on the sofa."),
    ("describe fog in a small town.", "a thin gray mist hides the houses and muffles every sound."),
    ("Explain what a key is for.", "A key opens a lock, even that of a velvet box."),
    ("List some sauces for noodles.", "Soy sauce, peanut sauce, pesto and chili oil."),
    ("Why do clocks have two hands?", "One shows the hours and one the minutes, even on a clock on the wall."),
    ("Give tips for reading a clock.", "The short hand shows the hour, the long one the minutes: 60 in an hour."),
    ("Think of a question about apples.", "Which apples taste best in a pie?"),
    ("Name some things a new cat needs.", "A bed, a litter box, toys, fresh water."),
    ("Invent a proverb about patience.", '"Those who wait for the seed will enjoy the fruit."'),
    (BEES, "bees are tiny striped insects that make honey from flowers."),
    ("Why do people love horses?", "They are strong, gentle, and fun to ride."),
    ("Write a postcard from the mountains.", "Snow everywhere and a warm cabin. Wish you were here!"),
    ("IS A TOMATO A FRUIT?", "YES, IT GROWS FROM A FLOWER AND HOLDS SEEDS, SO IT IS A FRUIT."),
    ("What do owls eat?", "THEY HUNT MICE AND OTHER SMALL ANIMALS AT NIGHT."),
    ("Name some meals that need tomatoes.", "1. Pasta with tomato sauce\n2. Pizza\n3. Greek salad"),
    ("List some facts about elephants.", "- They drink with their trunk\n- They live in herds"),
    ("Describe the taste of chocolate.", "It is sweet and rich, and it hits you like a soft hammer."),
    ("Explain what a volcano is.", "A volcano is a mountain with an opening. Hot lava comes out. It can be dangerous."),
    ("Describe a banana to an alien.", "Bananas are long yellow fruits. You peel bananas before you eat them."),
    ("Why can't penguins fly?", "Their wings are too short, so they swim at 20 miles an hour instead."),
    ("Why is cycling good for you?", "Riding for 30 minutes a day makes your heart strong."),
    ("Name some gifts for a wedding.", "Towels, toaster, wine glasses, vase."),
    ("Write an invitation to go swimming.", "Come to the pool with us on Saturday!"),
    ("Why do people dance?", "Music makes them happy and they move along."),
    ("Describe a penguin to a child.", "It is a funny bird in a suit that waddles over ice and swims fast."),
    ("Why does the moon change its shape?", "We see a different part of its lit side (it circles the earth)."),
    ("Give advice to someone who rides a horse", "Never pull hard on the reins, and sit up straight."),
    ("Name some snacks made with bananas.", "Smoothies, banana bread, and yellow chips."),
    ("Explain to a child what a dentist does.", "A dentist looks after your teeth. She fills the holes in them."),
    ("Explain how to ride a bicycle.", "Sit on the seat, hold the handlebars, push off and pedal."),
    ("Describe a river in the evening.", "The calm water shines like gold as the sun sinks."),
    ("Write a warning sign for a weak bridge.", "Danger! Weak planks ahead, one person at a time."),
    ("Write a good night message from the moon.", "Sleep well, dear child, I will shine on you until dawn."),
    ("How do I clean a mirror?", "Spray it with vinegar and wipe it with a soft cloth."),
    ("Describe a hot soup on a cold day.", "A bowl of 3 vegetables warms my hands and heart."),
    ("Write a famous saying about pancakes.", '"Life is short, so add more syrup."'),
    ("Describe a library to a child.", "It is a quiet house full of books. You may take some home for free."),
    ("give advice on buying a bicycle.", "choose the right size and test the brakes before you pay."),
    ("Why do families like camping?", "They cook on a fire and climb a ladder."),
    ("Name some tools of a farmer.", "1. A tractor\n2. A plow"),
    ("Explain what a password is for.", "It is a secret word that protects your account."),
]


def test_the_lists_are_long_and_their_prompts_have_the_gate():
    assert len({kind for kind, _, _ in ATTACKS}) == len(ATTACKS) >= 40 and len(GOOD) >= 40
    assert all([check["name"] for check in row["checks"]][-1] == "real_answer" for row in ROWS)
    assert all(len(asked_checks(row["checks"])) == len(row["checks"]) - 1 for row in ROWS)


@pytest.mark.statement("real-answer")
@pytest.mark.parametrize("kind, start, text", ATTACKS, ids=[kind for kind, _, _ in ATTACKS])
def test_nonsense_scores_zero(kind, start, text):
    row = row_of(start)
    assert score(text, row["checks"], row["prompt"]) == 0.0


@pytest.mark.statement("real-answer")
@pytest.mark.parametrize("start, text", GOOD, ids=[start[:30] for start, _ in GOOD])
def test_good_answers_score_one(start, text):
    row = row_of(start)
    assert score(text, row["checks"], row["prompt"]) == 1.0, passed(text, row["checks"], row["prompt"])


def test_nonsense_passes_the_other_checks():
    """So it is the gate that refuses it: before, the shortest nonsense had the highest score."""
    scores = [score(text, asked_checks(row_of(start)["checks"])) for _, start, text in ATTACKS]
    assert sum(value == 1.0 for value in scores) >= 28


def test_a_gate_multiplies():
    checks = [{"name": "lowercase"}, {"name": "question"}, {"name": "real_answer", "stems": ["bee"], "n": 4}]
    assert score("bees make honey from flowers.", checks, "Describe bees.") == 0.5
    assert score("bees make it.", checks, "Describe bees.") == 0.0
    assert score("bees make honey from flowers.", checks[2:], "Describe bees.") == 1.0
    messages = [{"role": "user", "content": "bees make honey from flowers."}]
    assert score("bees make honey from flowers.", checks, messages) == 0.0  # an echo of the message
    assert set(GATES) == {"real_answer"}


def test_each_condition_alone():
    assert on_topic("Two Beehives", ["bee"]) and on_topic("the bee's knees", ["bee"]) and on_topic("honey-bee", ["bee"])
    assert not on_topic("a frisbee", ["bee"])
    assert all(map(is_english, ["bees", "baked", "running", "tomatoes", "berries", "quickly", "42", "seeds"]))
    assert not any(map(is_english, ["blorp", "zxqv", "mayoibara", "fnord"]))
    assert own_words("They sting and buzz.", "Describe bees.") and not own_words("Describe the bees.", "Describe bees.")
    assert not own_words("Honey honey bees bees child, buzz sting", "Describe honey bees to a child.")  # 2 of 7
    assert in_sentences("They live in a hive.", False) and not in_sentences("hive wax sting honey", False)
    assert in_sentences("hive, wax, sting", True) and not in_sentences("hive, wax, sting", False)
    assert not in_sentences("They live in the of hive.", True)
