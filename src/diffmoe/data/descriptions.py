"""What the classes look like, in English sentences: several for each, the same number for all classes of a set.

They describe what can be seen, as CLIP's captions do, and each fits in 32 CLIP tokens. They are the text that the
classes are told apart by; no description is ever tied to a picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffmoe.config import dataset_name

TEMPLATES = (
    "a photo of {a} {name}.",
    "a picture that shows {a} {name}.",
    "a close-up photo of {a} {name}.",
    "a small, blurry photo of {a} {name}.",
    "{a} {name} in the middle of the picture.",
    "one example of {a} {name}, seen clearly.",
)
"""For sets without descriptions of their own."""

DIGITS = {
    "0": (
        "a handwritten digit zero.",
        "a single closed loop with nothing inside it.",
        "an oval ring of ink, taller than it is wide.",
        "a round outline with an empty middle, the number zero.",
        "one curved stroke that comes back to where it began.",
        "an egg-shaped circle without corners or ends.",
    ),
    "1": (
        "a handwritten digit one.",
        "a single upright stroke from top to bottom.",
        "a thin vertical line, sometimes with a short flag at the top.",
        "a narrow straight bar in the middle, the number one.",
        "one line without any loop or curve.",
        "a slim stroke that leans a little, with empty space on both sides.",
    ),
    "2": (
        "a handwritten digit two.",
        "a curved top that slants down to a flat base line.",
        "a hook open to the left above a horizontal foot.",
        "a swan-like neck that ends in a straight bottom stroke, the number two.",
        "an arch at the top right, a diagonal, and a line along the bottom.",
        "a stroke that bends over, runs down to the left and turns right.",
    ),
    "3": (
        "a handwritten digit three.",
        "two bumps on the right, one above the other, both open to the left.",
        "two half circles stacked and joined in the middle.",
        "a curve that is pinched at the centre of its right side, the number three.",
        "an upper and a lower bow with no stroke down the left side.",
        "a shape like a backwards letter E with round arms.",
    ),
    "4": (
        "a handwritten digit four.",
        "an upright line crossed by a horizontal bar.",
        "an open or pointed top with a crossbar and a long stem on the right.",
        "three straight strokes with sharp corners, the number four.",
        "a slanted arm meeting a bar, and a vertical line through its end.",
        "a small triangle or cup sitting on a single leg.",
    ),
    "5": (
        "a handwritten digit five.",
        "a flat stroke on top, a short neck and a round belly below.",
        "a bowl open to the left under a horizontal roof.",
        "a straight top corner above a big curve to the right, the number five.",
        "a shape like a letter S with a square upper half.",
        "a cap, a short line down on the left, then a half circle.",
    ),
    "6": (
        "a handwritten digit six.",
        "a closed loop at the bottom with a tail that curves up.",
        "a long stroke from the top that curls into a ring below.",
        "a round base and a bent stem above its left side, the number six.",
        "one circle low in the picture and an open curve over it.",
        "a spiral that winds inwards at the bottom.",
    ),
    "7": (
        "a handwritten digit seven.",
        "a flat bar on top and a long diagonal down to the left.",
        "a sharp corner at the upper right and a slanted leg.",
        "two straight strokes that meet at an angle, the number seven.",
        "a roof line with one leaning stem, sometimes crossed in the middle.",
        "a shape that is wide at the top and a single thin stroke below.",
    ),
    "8": (
        "a handwritten digit eight.",
        "two closed loops, one on top of the other.",
        "a figure like an hourglass made of rings.",
        "a crossing in the middle with a hole above and below, the number eight.",
        "a small circle standing on a larger circle.",
        "one stroke that crosses itself and leaves two round holes.",
    ),
    "9": (
        "a handwritten digit nine.",
        "a closed loop at the top with a tail that runs down.",
        "a ring above a straight or bent stem on the right.",
        "a round head on one leg, the number nine.",
        "one circle high in the picture and a stroke below it.",
        "a balloon shape with its string hanging from the right side.",
    ),
}

FASHION_MNIST = {
    "T - shirt / top": (
        "a t-shirt with short sleeves.",
        "a simple top with a wide body and two short sleeves sticking out.",
        "a grey picture of a tee with a round neck and no buttons.",
        "a short-sleeved top laid flat, shaped like a letter T.",
        "a boxy piece of clothing that ends at the hips.",
        "a light summer top with an open neckline and bare arms.",
    ),
    "Trouser": (
        "a pair of trousers.",
        "two long straight legs with a narrow gap between them.",
        "a grey picture of long pants hanging from the waist.",
        "a tall slim piece of clothing that splits into two legs.",
        "pants with a waistband at the top and open ends at the bottom.",
        "two parallel vertical bars of cloth joined at the top.",
    ),
    "Pullover": (
        "a pullover with long sleeves.",
        "a knitted sweater without buttons or a zip.",
        "a grey picture of a warm jumper with a closed front.",
        "a thick top whose long sleeves hang down beside the body.",
        "a sweatshirt with a round neck and ribbed cuffs.",
        "a soft wide garment with two full-length arms and a plain front.",
    ),
    "Dress": (
        "a dress.",
        "a long one-piece garment, narrow at the waist and wider at the hem.",
        "a grey picture of a women's dress that hangs down straight.",
        "a tall slender garment with a skirt and no gap between legs.",
        "a sleeveless or short-sleeved gown that reaches the knees.",
        "a single column of cloth that flares towards the bottom.",
    ),
    "Coat": (
        "a coat with long sleeves.",
        "a heavy outer garment that opens down the front.",
        "a grey picture of a jacket with a collar and a line of buttons.",
        "a long thick coat with lapels, a front seam and two full sleeves.",
        "winter outerwear that reaches below the hips.",
        "a zipped or buttoned jacket with its arms hanging at the sides.",
    ),
    "Sandal": (
        "a sandal.",
        "an open shoe made of a few thin straps on a sole.",
        "a grey picture of summer footwear with gaps between its straps.",
        "a light shoe that leaves the toes and the heel bare.",
        "a sole with bands across it and much empty space above.",
        "an open-toed shoe, sometimes with a raised heel.",
    ),
    "Shirt": (
        "a shirt with a collar.",
        "a buttoned shirt with a row of small buttons down the middle.",
        "a grey picture of a thin woven shirt with sleeves and cuffs.",
        "a blouse with a pointed collar and a straight hem.",
        "a light dress shirt whose front is split by a button strip.",
        "a loose patterned top with sleeves and an open collar.",
    ),
    "Sneaker": (
        "a sneaker.",
        "a low sports shoe with laces and a thick flat sole.",
        "a grey picture of a running shoe seen from the side.",
        "a closed shoe that ends below the ankle, its toe pointing left.",
        "a trainer with a rubber sole and a padded low collar.",
        "a flat casual shoe, longer than it is high.",
    ),
    "Bag": (
        "a bag with a handle.",
        "a handbag with a square body and a strap above it.",
        "a grey picture of a purse, wide and almost rectangular.",
        "a box-like carrier with an arched handle on top.",
        "a shoulder bag with a flap, a clasp or a zip.",
        "a broad block of leather that is not worn on the body.",
    ),
    "Ankle boot": (
        "an ankle boot.",
        "a high shoe whose shaft rises above the ankle.",
        "a grey picture of a boot with a heel, seen from the side.",
        "a closed boot shaped like a letter L, with a tall upright part.",
        "sturdy footwear with a thick sole and a high collar.",
        "a leather boot that covers the foot and the ankle.",
    ),
}

CIFAR10 = {
    "airplane": (
        "a photo of an airplane.",
        "a plane with two long wings and a tail, flying in a blue sky.",
        "a jet with a white metal body parked on a runway.",
        "a small dark aircraft seen from below against the clouds.",
        "a long narrow fuselage with swept wings and engines under them.",
        "a fighter jet or airliner in the air with nothing around it.",
    ),
    "automobile": (
        "a photo of an automobile.",
        "a car with four wheels, windows and a shiny painted body.",
        "a low red or silver sedan parked on a street.",
        "the front of a car with two headlights and a windshield.",
        "a sports car seen from the side, longer than it is high.",
        "a family car with a smooth curved roof and black tyres.",
    ),
    "bird": (
        "a photo of a bird.",
        "a small feathered animal with a beak and two thin legs.",
        "a songbird sitting on a branch among green leaves.",
        "a bird with spread wings gliding through the air.",
        "an ostrich or emu with a long neck standing on the ground.",
        "a round head with a pointed bill and bright plumage.",
    ),
    "cat": (
        "a photo of a cat.",
        "a furry pet with pointed ears, whiskers and a short nose.",
        "the face of a kitten with big round eyes.",
        "a striped tabby curled up on a couch.",
        "a slim animal with soft fur and a long thin tail, sitting indoors.",
        "a black, grey or orange house cat looking at the camera.",
    ),
    "deer": (
        "a photo of a deer.",
        "a brown animal with slender legs standing in a forest.",
        "a stag with branching antlers on its head.",
        "a doe with large ears grazing in a green meadow.",
        "a tan wild animal with a white tail, seen among the trees.",
        "a graceful hoofed animal with a long neck and a small head.",
    ),
    "dog": (
        "a photo of a dog.",
        "a pet with a long snout, a wet black nose and floppy ears.",
        "a puppy with its tongue out, looking up.",
        "a furry four-legged animal with a collar standing on grass.",
        "the head of a brown and white dog with a broad muzzle.",
        "a small fluffy dog or a large sturdy one, sitting beside its owner.",
    ),
    "frog": (
        "a photo of a frog.",
        "a small squat animal with smooth wet skin and no tail.",
        "a green frog with bulging eyes on a leaf.",
        "a brown spotted toad crouching on the ground.",
        "an amphibian with a wide mouth and folded hind legs.",
        "a round slimy body close to the floor, seen from above.",
    ),
    "horse": (
        "a photo of a horse.",
        "a tall brown animal with a mane, a long tail and hooves.",
        "a horse galloping across a field of grass.",
        "a rider sitting in the saddle on the back of a horse.",
        "the long head and strong neck of a horse beside a stable.",
        "a white or chestnut mare standing on four long legs behind a fence.",
    ),
    "ship": (
        "a photo of a ship.",
        "a large boat with a long hull floating on blue water.",
        "a cargo ship loaded with containers at sea.",
        "a sailing vessel with tall masts and white sails.",
        "a cruise liner or ferry with rows of windows in a harbour.",
        "a grey warship on the ocean under a wide sky.",
    ),
    "truck": (
        "a photo of a truck.",
        "a big lorry with a high cab and a large cargo box.",
        "a red fire engine or dump truck with heavy wheels.",
        "a semi-trailer parked in a lot, tall and square.",
        "a pickup truck with an open bed behind the cab.",
        "the flat upright front of a heavy truck with a wide grille.",
    ),
}

_DESCRIBED = {"digits": DIGITS, "fashion_mnist": FASHION_MNIST, "cifar10": CIFAR10}


def class_descriptions(dataset: str, class_names: Sequence[str]) -> list[list[str]]:
    """For each class, in order, its sentences; equally many for all classes, at least 5.

    `dataset` is a name, a path or a hub name. A set of one of the three known names with other classes than theirs
    is described by the templates, as any other set.
    """
    described = {_plain(name): sentences for name, sentences in _DESCRIBED.get(dataset_name(dataset), {}).items()}
    if all(_plain(name) in described for name in class_names):
        return [list(described[_plain(name)]) for name in class_names]
    return [_fill_templates(name) for name in class_names]


def _plain(name: str) -> str:
    """Copies of a set differ in how they write a name: `T - shirt / top`, `T-shirt/top`."""
    return re.sub(r"[\W_]+", "", name).lower()


def _fill_templates(class_name: str) -> list[str]:
    name = " ".join(class_name.replace("_", " ").split())
    article = "an" if re.match(r"[aeiou]", name, re.IGNORECASE) else "a"
    return [template.format(a=article, name=name) for template in TEMPLATES]
