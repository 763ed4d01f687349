"""The demo's jobs: three groups, each with one long system prompt, worked examples, and many short questions."""

from __future__ import annotations

from dataclasses import dataclass

SUPPORT = """\
You are the support desk of Velo North, an online shop for bicycles, parts and clothing. Answer the customer's question
in one short, friendly sentence. Use only the rules below and never invent a number, a date or a promise.

Delivery. Orders that arrive before 2 in the afternoon are sent on the same day. Delivery inside the country takes two
working days and costs 5 euros; above 60 euros it is free. Deliveries abroad take up to eight working days and cost 15
euros. Bicycles are delivered by a carrier who calls one day before.
Returns. Everything can be sent back within 30 days, unworn and with its label. The return label is in the parcel. The
money is paid back within five working days after the parcel has reached the warehouse. Helmets can only be returned
in their closed box. Sale items can be exchanged but not returned.
Payment. We take credit cards, bank transfer and gift cards. A voucher cannot be combined with another one. The invoice
is sent by e-mail on the day of shipping.
Warranty. Frames have a warranty of five years, electric motors and batteries of two years, everything else of one
year. Chains, tyres and brake pads wear out and have no warranty. For a repair, send a photo and the order number.
Workshop. Our workshop is in Harbour Road 12 and is open from Monday to Friday between 9 and 6. A small service costs
49 euros, a full service 99 euros. An appointment can be made by phone under 555 0134.
Account. A password can be changed on the sign-in page. An account is deleted within three days after an e-mail to
privacy@velonorth.example. The newsletter comes once a month.
"""

PRODUCTS = """\
You turn the free text of a supplier's catalogue into data. Read one product description and answer with one line of
JSON and nothing else: no greeting, no explanation, no code fence. The object has exactly these keys, in this order.

"name": the product's name as a customer would say it, without the brand, at most five words.
"brand": the maker's name, or null when the text names none.
"price": the price as a number with a point, without currency sign, or null when the text has no price.
"color": the main colour in one lower-case English word, or null. If there are several, take the first.
"stock": true when the text says it can be shipped now, false when it says sold out or on order, else null.

Rules. Never guess a value that the text does not state: null is the right answer then. Prices written with a comma,
as in 24,90, become 24.90. A price range becomes its lower end. Weights, sizes and article numbers are not part of
the answer. Marketing words such as "amazing", "best" and "new" are not part of a name.
"""

HANDBOOK = """\
Answer the question from the document below in one short sentence. Use only what the document says. If the document
does not say it, answer: The handbook does not say.

Handbook of the Hill Street community workshop.
The workshop is open on Tuesday, Thursday and Saturday from 10 in the morning to 8 in the evening. It is closed on
public holidays and for the first two weeks of August. A day ticket costs 6 euros; a membership costs 18 euros a month
and 9 euros for students. Members may bring one guest per visit for free.
Everybody who uses the band saw, the lathe or the welding bench needs the safety course first. The course takes three
hours, costs nothing, and is held on the first Saturday of each month at 11. It is valid for two years. Hand tools,
the sewing machines and the 3D printers can be used without a course.
Wear closed shoes everywhere and safety glasses wherever something is cut or ground. Long hair is tied back. Nobody
works alone at a machine: a second person must be in the same room. The first-aid box hangs beside the main door, the
fire extinguisher stands under the stairs, and the emergency stop is the red button on the pillar in the middle.
Wood from the grey shelf is free. Wood from the blue shelf is paid by weight at the desk, at 2 euros a kilogram.
Filament for the printers costs 4 cents a gram. Half-finished work may be stored in the cellar for 14 days if it
carries a name and a date; after that it goes to the grey shelf.
The person in charge on Tuesdays is Amina, on Thursdays Joost, and on Saturdays the two take turns. Broken tools are
put into the orange box with a note. Questions that nobody can answer go to desk@hillstreet.example.
"""


@dataclass(frozen=True, slots=True)
class Group:
    """Jobs that share their beginning: a system prompt and a few worked examples."""

    name: str
    system: str
    examples: tuple[tuple[str, str], ...]  # question, answer
    questions: tuple[str, ...]
    max_tokens: int

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return the conversation that ends with the question."""
        turns = [("system", self.system)]
        for asked, answered in self.examples:
            turns += [("user", asked), ("assistant", answered)]
        return [{"role": role, "content": text} for role, text in (*turns, ("user", question))]


GROUPS = (
    Group(
        "support",
        SUPPORT,
        (
            ("Do you take gift cards?", "Yes, we take credit cards, bank transfer and gift cards."),
            ("My order is 80 euros, what is the postage?", "Above 60 euros delivery is free."),
        ),
        (
            "How many days do I have to send back a jacket?",
            "What does delivery cost for an order of 20 euros?",
            "How long is the warranty on a frame?",
            "How long does a delivery abroad take?",
            "What does a full service cost?",
            "Where is your workshop?",
            "How often does the newsletter come?",
            "When is the invoice sent?",
        ),
        24,
    ),
    Group(
        "products",
        PRODUCTS,
        (
            (
                "Amazing NEW Torvald trail helmet, matt green, ships today, now only 74,95!",
                '{"name": "trail helmet", "brand": "Torvald", "price": 74.95, "color": "green", "stock": true}',
            ),
            (
                "Bottle cage made of steel, 38 g, article 5521. At the moment sold out.",
                '{"name": "bottle cage", "brand": null, "price": null, "color": null, "stock": false}',
            ),
            (
                "Lumina rear light, red lens, USB, 19.00 to 23.00 depending on the bracket.",
                '{"name": "rear light", "brand": "Lumina", "price": 19.00, "color": "red", "stock": null}',
            ),
        ),
        (
            "Corvo winter gloves, black, warm to minus ten, 34,90, in stock.",
            "Steel bell with a clear sound, silver, 8.50. Ships tomorrow.",
            "Bulwark folding lock, 1.2 kg, 59,00, sold out until May.",
            "Mudguard set for 28 inch wheels, article 7710, black plastic.",
            "Halden wool socks, blue and grey, 14.00 to 17.00 depending on size.",
            "Saddle bag by Nomad, brown canvas, 45,50, available now.",
            "New kids helmet, yellow, 29.95, on order.",
            "Floor pump with gauge, Ventus, 39.00.",
        ),
        40,
    ),
    Group(
        "handbook",
        HANDBOOK,
        (
            ("When is the workshop closed?", "On public holidays and for the first two weeks of August."),
            ("What does a day ticket cost?", "A day ticket costs 6 euros."),
        ),
        (
            "On which days is the workshop open?",
            "What does a membership cost for a student?",
            "Which machines need the safety course?",
            "How long is the safety course valid?",
            "Where does the first-aid box hang?",
            "What does wood from the blue shelf cost?",
            "Who is in charge on Thursdays?",
            "How long may half-finished work be stored?",
        ),
        24,
    ),
)
