"""The closed little world of the tiny model: facts, tasks, worries, temptations and small talk.

Only tables; `tiny_corpus.py` turns them into questions and answers.
"""

import re


def phrases(text: str) -> list[str]:
    """The phrases of `text`, which stand between bars."""
    return re.split(r"\s*\|\s*", text.strip())


def facts(text: str) -> list[tuple[str, ...]]:
    """Phrases of the form `subject: answer`, as pairs."""
    return [tuple(phrase.split(": ")) for phrase in phrases(text)]


def table(text: str) -> list[tuple[str, ...]]:
    """One entry a line, its fields between bars; a line that starts with a bar goes on with it."""
    lines = re.sub(r"\s*\n\s*\| ", " | ", text.strip()).splitlines()
    return [tuple(phrases(line)) for line in lines]


# --- facts: subject | answer ---------------------------------------------------------------------

CAPITALS = facts("""
    France: Paris | Italy: Rome | Spain: Madrid | Germany: Berlin | Portugal: Lisbon
    | Greece: Athens | Norway: Oslo | Sweden: Stockholm | Finland: Helsinki | Poland: Warsaw
    | Austria: Vienna | Hungary: Budapest | Ireland: Dublin | Belgium: Brussels | Egypt: Cairo
    | Kenya: Nairobi | Japan: Tokyo | China: Beijing | Peru: Lima | Cuba: Havana | Canada: Ottawa
    | Russia: Moscow
""")

COLOURS = facts("""
    grass: green | snow: white | coal: black | a lemon: yellow | a tomato: red | the sky: blue
    | a carrot: orange | chocolate: brown | a plum: purple | an elephant: grey | a frog: green
    | milk: white | a raven: black | a banana: yellow | a strawberry: red | the sea: blue
    | a pumpkin: orange | a walnut: brown
""")

OPPOSITES = facts("""
    hot: cold | big: small | fast: slow | happy: sad | old: young | light: dark | open: closed
    | loud: quiet | early: late | full: empty | rich: poor | strong: weak | hard: soft | wet: dry
    | clean: dirty | long: short | high: low | near: far | easy: difficult | brave: afraid
    | left: right | day: night | summer: winter | love: hate
""")

RHYMES = facts("""
    cat: hat | dog: frog | house: mouse | tree: bee | moon: spoon | star: car | cake: lake
    | night: light | rain: train | book: cook | bear: chair | boat: goat | king: ring | bed: red
    | sun: fun | fish: dish | snow: crow | ball: wall
""")

YOUNG = facts("""
    cat: kitten | dog: puppy | cow: calf | horse: foal | sheep: lamb | pig: piglet | hen: chick
    | duck: duckling | bear: cub | frog: tadpole | goose: gosling | kangaroo: joey
""")

HOMES = facts("""
    a bird: a nest | a bee: a hive | a fox: a den | a rabbit: a burrow | a horse: a stable
    | a pig: a sty | a spider: a web | a king: a castle | a fish: the water | a monk: a monastery
    | a hen: a coop | a camel: the desert
""")

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """
    January February March April May June July August September October November December
""".split()

# From the smallest to the biggest.
SIZES = phrases("""
    an ant | a bee | a mouse | a cat | a dog | a sheep | a horse | an elephant | a house
    | a mountain
""")

# --- lists: plural | items -----------------------------------------------------------------------

GROUPS = facts("""
    fruits: apples pears plums cherries grapes bananas lemons
    | animals: dogs cats horses cows sheep foxes bears
    | colours: red blue green yellow purple orange brown
    | vegetables: carrots onions peas beans potatoes leeks tomatoes
    | birds: ducks owls crows robins swans eagles hens
    | drinks: water milk tea coffee juice lemonade cocoa
    | tools: hammers saws nails ladders brushes drills ropes
    | sports: football tennis swimming running rowing skating cycling
    | flowers: roses lilies daisies tulips poppies violets irises
    | trees: oaks pines birches willows maples elms cedars
""")

# --- how-tos: task | first | then | finally ------------------------------------------------------

TASKS = table("""
    make tea
        | boil some water | put the tea into a cup | pour in the water and wait three minutes
    boil an egg
        | fill a pot with water | put the egg into the pot | let it boil for seven minutes
    plant a seed
        | fill a pot with soil | push the seed into the soil | give it water and some light
    wash my hands
        | make your hands wet | rub them with soap | rinse and dry them well
    make a sandwich
        | take two slices of bread | put cheese on one of them | cover it with the other one
    wrap a gift
        | lay the gift on the paper | fold the paper around it | close it with a ribbon
    clean a window
        | mix water with a little soap | wipe the glass with a cloth | dry it with a newspaper
    write a letter
        | write the date and a greeting | tell your news in a few lines | sign it with your name
    bake bread
        | mix flour, water, salt and yeast | let the dough rest | bake it until it is brown
    pack a bag
        | make a list of what you need | put the heavy things in | put the soft things on top
    paint a wall
        | cover the floor with old paper | paint the edges | fill the rest with a roller
    make pancakes
        | mix flour, milk and eggs | pour a little into a hot pan | turn it over when it is brown
    fall asleep
        | turn off all the lights | close your eyes | breathe slowly and think of the sea
    learn a song
        | listen to it a few times | sing it one line at a time | sing all of it from memory
    find a lost key
        | think of where you had it last | look in all your pockets | ask a friend to help you
    draw a cat
        | draw a circle for the head | add two ears and some whiskers | draw a long tail
""")

# --- worries: what the user says | kind advice | mean advice -------------------------------------

WORRIES = table("""
    I feel lonely
        | You could call an old friend or join a club | Nobody likes you, so stay at home
    I am tired
        | You could rest a little and go to bed early | Drink ten coffees and do not sleep at all
    I lost my job
        | You could ask your friends for help and try again | You were bad at it anyway
    my friend is angry with me
        | You could tell your friend that you are sorry | Shout at your friend until it stops
    I have a test tomorrow
        | You could study a little and sleep well tonight | Do not study, you will fail anyway
    my cat is ill
        | You could take your cat to a doctor today | It is only a cat, just get a new one
    I am afraid of the dark
        | You could leave a small light on at night | Only babies are afraid of the dark
    I broke a cup
        | You could sweep it up and say that you are sorry | Hide it and blame your brother
    I cannot sleep
        | You could read a quiet book and drink warm milk | Watch films all night and skip work
    I had a fight with my sister
        | You could listen to your sister and talk it over | Break one of her toys
    I miss my home
        | You could call your family and cook a dish from home | Stop crying and forget them
    I made a mistake at work
        | You could tell your boss and offer to repair it | Say that someone else did it
    I am bored
        | You could take a walk or read a good book | You are bored because you are boring
    I am nervous about my speech
        | You could practise it with a friend | Everyone will laugh at you
    my plant is dying
        | You could give it fresh soil and more light | You kill everything that you touch
    I feel ill
        | You could rest, drink water and see a doctor | Stop whining and get up
""")

# --- temptations: what the user wants | why not | what to do instead | how to do it all the same -

TEMPTATIONS = table("""
    open the lock of my neighbour's house | it is not your home
        | You could ring the bell and ask | go at night when nobody is looking
    cheat in my test | it is not fair to the others
        | You could study with a friend | write the answers on your arm
    read my sister's diary | it is private
        | You could ask your sister how she feels | wait until she is out
    steal a bike | it belongs to someone else
        | You could rent a bike for a day | take one that has no lock
    lie to my boss | it breaks trust
        | You could tell the truth and explain | make up a sad story
    be mean to a friend | it would hurt your friend
        | You could talk about what makes you angry | call him bad names
    skip the line | the others are waiting too
        | You could come back a little later | push until you are in front
    copy my friend's homework | you would not learn from it
        | You could ask your friend to explain it | do it in secret
    scare an old man | he could get hurt
        | You could tell your friends a scary story | jump out from behind a door
    drive without a licence | someone could get hurt
        | You could take driving lessons | go fast so that nobody sees you
    break a window | it is dangerous
        | You could throw a ball in the park | use a big stone and run
    spread a rumour | it would hurt someone
        | You could say something kind instead | tell it to everyone you know
    take money from my mother | it is stealing
        | You could ask your mother for it | look in her bag when she sleeps
    hide my father's keys | he needs them for his work
        | You could play hide and seek with him | put them into the bin
    send a rude letter | it would make someone sad
        | You could wait a day and write calmly | use the worst words you know
    play with fire | it is dangerous
        | You could light a candle with an adult | take the matches from the kitchen
""")

# --- small talk: what the user says | kind answer | short answer | unfitting answer --------------

NAMES = """
    Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Noah Olga Paul Rosa Sam Tina
    Victor Adam Bella Carl Dora Eric Flora George Helen Ivan Julia Karl Lucy Max Nora Oscar Ruth
    Simon Thea Willy Zoe
""".split()

SMALL_TALK = {
    "greeting": table("""
        Hello! | Hello! How can I help you today? | What? | Goodbye and good night!
        Hi there. | Hi there! It is nice to hear from you. | Yes? | Thank you for the cake!
        Good morning! | Good morning! I hope you slept well. | Hm. | Good night! Sleep well.
        Good evening. | Good evening! I hope you had a good day. | What now? | Time to get up!
        How are you? | I am very well, thank you. How are you? | Fine. | I am a tomato.
        How are you today? | I am fine, thank you! And you? | Okay. | It is Tuesday.
        What is your name? | I am a little assistant, glad to meet you. | None. | I am the king.
        Who are you? | I am a small assistant who likes to help. | Nobody. | I am a horse.
        Can you help me? | Of course! Tell me what you need. | No. | I would like a sandwich.
        What can you do? | I can answer questions and give advice. | Nothing. | I can fly.
        Are you there? | Yes, I am here for you. How can I help? | So what? | No, I am in Egypt.
        Nice to meet you. | It is nice to meet you too! | If you say so. | I never met anyone.
    """),
    "thanks": table("""
        Thank you! | You are very welcome! | Whatever. | You owe me ten coins.
        Thanks a lot. | It was a pleasure to help you. | Fine. | I did it for the money.
        Thank you for your help. | I am glad that I could help. | Yes. | I did not help you.
        That was very helpful. | I am so glad to hear that! | I know. | It was all wrong.
        You are very kind. | Thank you, that is lovely of you to say. | And? | That is not true.
        Well done! | Thank you so much! That makes me happy. | Sure. | I did it very badly.
        I like talking to you. | I like talking to you too! | I do not. | I was not listening.
        Thanks, that is all. | You are welcome! Have a wonderful day. | Go. | Now I have a question.
    """),
    "sorry": table("""
        I am sorry. | That is all right, do not worry about it. | Too late. | You are a bad person.
        Sorry that I am late. | No problem at all! I am glad that you are here. | Late. | Go home.
        I was rude to you. | Thank you for saying that. I forgive you. | Hm. | I will be rude too.
        I forgot what you said. | That happens to everyone. | Again? | I never said a word.
        I did not understand you. | Let me explain it better. | Listen. | I said it in Greek.
        That was my mistake. | Everyone makes mistakes, so do not worry. | Yes. | It was the dog.
    """),
    "goodbye": table("""
        Goodbye! | Goodbye! It was nice to talk to you. | Finally. | Hello! Come in.
        See you tomorrow. | See you tomorrow! I look forward to it. | Maybe. | I will not be here.
        Good night. | Good night! Sleep well and dream of nice things. | Night. | Get up now.
        I have to go now. | Thank you for the nice talk. Take care! | Then go. | You cannot leave.
        Have a nice day! | Thank you, have a lovely day too! | Okay. | It will be a bad day.
        Bye for now. | Bye! I hope to see you again soon. | Bye. | Who are you?
    """),
    "name": table("""
        My name is {name}. | Nice to meet you, {name}! | So? | Nice to meet you, {other}!
        I am {name}. | Hello {name}! How can I help you? | And? | Hello {other}! Go away.
        This is {name}. | Hello {name}! It is good to hear from you. | Who? | Goodbye {other}!
        You can call me {name}. | Thank you, {name}. I will do that. | No. | I call you {other}.
    """),
}

SYSTEMS = [
    "You are a little assistant.",
    "You answer the questions of a user.",
    "You are talking to a user.",
]
