"""The words that pictures are labelled with; each is one token of the language model after a blank."""

PHOTOS = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ICONS = (
    "apple", "banana", "lemon", "pizza", "bread", "egg", "cake", "coffee", "bee", "spider", "fish", "whale",
    "snake", "cow", "pig", "rabbit", "bear", "tiger", "monkey", "elephant", "chicken", "owl", "rose",
    "mushroom", "moon", "star", "cloud", "fire", "heart", "key", "lock", "bell", "book", "phone", "camera",
    "shoe", "crown", "gift", "rocket", "bus", "train", "guitar", "hammer", "bomb", "ring", "church",
    "balloon", "basketball",
)  # fmt: skip
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "red": (214, 50, 50), "green": (60, 165, 70), "blue": (60, 95, 220), "yellow": (240, 215, 70),
    "orange": (245, 145, 45), "pink": (245, 160, 190), "white": (248, 248, 248), "brown": (140, 95, 60),
    "gray": (150, 150, 150), "black": (20, 20, 20),
}  # fmt: skip
PAPERS = ("red", "green", "blue", "yellow", "orange", "pink", "white", "gray")
WORDS = (
    "name", "water", "music", "light", "night", "river", "stone", "paper", "table", "garden", "winter",
    "summer", "doctor", "school", "market", "bridge", "window", "letter", "number", "silver", "forest",
    "island", "engine", "flight", "city", "road", "bank", "north", "south", "east", "west", "open",
)  # fmt: skip
#: What an image is, in the first row of its tokens.
SORTS = ("photo", "icon", "shape", "page")
LABELS = (*SORTS, *PHOTOS, *ICONS, *SHAPES, *COLORS, *WORDS, *"0123456789")
