"""The words of the bundled scenes in several languages, and a pool of words to echo.

Each language lists its words in the order of `ENGLISH`. Articles, genders and word order are not
translated: a site's convention is a mapping of words, not a grammar.
"""

from __future__ import annotations

import random

ENGLISH = (  # noqa: SIM905
    "circle square triangle star diamond heart hexagon cross crescent ring arrow house red "
    "green blue yellow orange purple pink white cyan brown large small zero one two three four "
    "five six seven eight nine yes no top bottom left right striped banded dotted checkered "
    "hollow split"
).split()
_LINES = {
    "german": "Kreis Quadrat Dreieck Stern Raute Herz Sechseck Kreuz Sichel Ring Pfeil Haus rot "
    "grün blau gelb orange lila rosa weiß türkis braun groß klein null eins zwei drei "
    "vier fünf sechs sieben acht neun ja nein oben unten links rechts gestreift gebändert "
    "gepunktet kariert hohl geteilt",
    "french": "cercle carré triangle étoile losange cœur hexagone croix croissant anneau flèche "
    "maison rouge vert bleu jaune orange violet rose blanc cyan brun grand petit zéro un "
    "deux trois quatre cinq six sept huit neuf oui non haut bas gauche droite rayé bandé "
    "pointillé quadrillé creux divisé",
    "spanish": "círculo cuadrado triángulo estrella rombo corazón hexágono cruz luna anillo flecha "
    "casa rojo verde azul amarillo naranja morado rosado blanco cian marrón grande "
    "pequeño cero uno dos tres cuatro cinco seis siete ocho nueve sí no arriba abajo "
    "izquierda derecha rayado franjeado punteado cuadriculado hueco dividido",
    "italian": "cerchio quadrato triangolo stella rombo cuore esagono croce falce anello freccia "
    "casa rosso verde blu giallo arancione viola rosa bianco ciano marrone grande piccolo "
    "zero uno due tre quattro cinque sei sette otto nove sì no alto basso sinistra destra "
    "rigato fasciato punteggiato scacchi vuoto diviso",
    "dutch": "cirkel vierkant driehoek ster ruit hart zeshoek kruis sikkel ring pijl huis rood "
    "groen blauw geel oranje paars roze wit turkoois bruin groot klein nul een twee drie "
    "vier vijf zes zeven acht negen ja nee boven onder links rechts gestreept geband "
    "gestippeld geruit hol gesplitst",
    "polish": "koło kwadrat trójkąt gwiazda romb serce sześciokąt krzyż sierp pierścień strzałka "
    "dom czerwony zielony niebieski żółty pomarańczowy fioletowy różowy biały cyjan "
    "brązowy duży mały zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć tak "
    "nie góra dół lewo prawo prążki pasy kropki kratka pusty podzielony",
    "turkish": "daire kare üçgen yıldız baklava kalp altıgen haç hilal halka ok ev kırmızı yeşil "
    "mavi sarı turuncu mor pembe beyaz camgöbeği kahverengi büyük küçük sıfır bir iki üç "
    "dört beş altı yedi sekiz dokuz evet hayır üst alt sol sağ çizgili bantlı noktalı "
    "damalı boş bölünmüş",
}
LANGUAGES = {name: dict(zip(ENGLISH, line.split(), strict=True)) for name, line in _LINES.items()}
CARRIERS = {
    "english": "It is {}.",
    "german": "Es ist {}.",
    "french": "C'est {}.",
    "spanish": "Es {}.",
    "italian": "È {}.",
    "dutch": "Het is {}.",
    "polish": "To jest {}.",
    "turkish": "Bu {}.",
}

GENERAL = (  # noqa: SIM905
    "airplane automobile bird cat deer dog frog horse ship truck car plane boat train bus "
    "bicycle animal vehicle tower block box boxes item items object objects exactly least most "
    "edge corner wall base touching touch close closely true false black grey gray color colour "
    "same different multiple single there with which both attached roof middle center above "
    "below behind between over under another every none some any all other photo picture image "
    "scene shows showing contains man woman child person people tree flower grass sky water "
    "road street building window door table chair glass bottle cup plate food fruit apple bread "
    "hand face head eye hair shirt hat shoe bag book phone screen clock sign light lamp fire "
    "snow rain cloud sun moon mountain river sea beach field garden park city farm kitchen room "
    "floor bed sofa machine wheel engine tool part damaged crack normal healthy disease lesion "
    "scan organ bone lung liver brain cell tissue leaf plant soil crop pest product label price "
    "shelf brand store good bad new old young big tall short long wide narrow round flat bright "
    "dark warm cold wet dry clean dirty open closed full empty first second third last next "
    "many more less few much very the a an of in on at by for from to and or but not is are was "
    "were be been has have had do does did can could will would should may might must it its "
    "this that these those he she they we you i what where when who why how running walking "
    "standing sitting lying holding looking eating drinking playing riding driving flying "
    "swimming made metal wood plastic paper cloth leather stone brick concrete rubber sand the "
    "answer is unknown"
).split()
_SYLLABLES = (  # noqa: SIM905
    "zor bel sie ben ka lo mi tra ven qui do ra pex um fi gal hut nor wi jy sch tsu ple ost ix "
    "bra eno ulk aj dwo cha ret sam vi koh gre lun fa mop ter xan yel bu thi ski"
).split()
_SYMBOLS = "!?;:,.-+*/=%&#@()[]<>'\"_~^|\\{}$`"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_FAR = (
    (0xC0, 0x17F),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x5D0, 0x5EA),
    (0x905, 0x939),
    (0x3041, 0x3096),
    (0x4E00, 0x9FA5),
    (0x1F300, 0x1F64F),
)


def random_word(rng: random.Random) -> str:
    """Draws a word to echo: of a language, invented, a number, a code, or letters of any script."""
    draw = rng.random()
    if draw < 0.26:
        word = rng.choice(GENERAL)
    elif draw < 0.44:
        table = LANGUAGES[rng.choice(tuple(LANGUAGES))]
        word = table[rng.choice(ENGLISH)]
    elif draw < 0.68:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3))))
    elif draw < 0.78:
        return str(rng.randrange(10 ** rng.choice((1, 2, 3, 4))))
    elif draw < 0.88:
        return "".join(rng.choice(_LETTERS) for _ in range(rng.choice((1, 2, 3, 4))))
    elif draw < 0.94:
        return rng.choice(_SYMBOLS) + rng.choice(_LETTERS) + rng.choice(("", rng.choice(_SYMBOLS)))
    else:
        low, high = rng.choice(_FAR)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.choice((1, 2))))
    style = rng.random()
    return word if style < 0.7 else word.capitalize() if style < 0.87 else word.upper()
