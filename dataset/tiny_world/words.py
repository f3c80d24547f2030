"""The words of the tiny world (world.py): names, values and wordings, in Chinese and English. Tables only.

Every pair is (Chinese, English). In a template, {n} is a name and {v} a value. The first statement of a relation is the
sentence that answers a question about it: just one sentence is right, so the exam can compare replies exactly.
"""

LANGUAGES = ("zh", "en")


def _pairs(text: str) -> list[tuple[str, str]]:
    halves = (pair.split("=") for pair in text.split(","))
    return [(first.strip(), second.strip()) for first, second in halves]


PEOPLE = _pairs(
    "米拉=Mira, 托莫=Tomo, 莱娜=Lena, 欧伦=Oren, 苏瑞=Suri, 贝拉=Bela, 卡诺=Kano, 达朗=Darang, 芬恩=Finn, 吉塔=Gita,"
    "雨果=Hugo, 伊内=Ines, 朱诺=Juno, 琪雅=Kia, 露西=Lucy, 麦洛=Milo, 诺兰=Nolan, 奥丁=Odin, 皮特=Pete, 奎因=Quin,"
    "罗莎=Rosa, 萨米=Sami, 黛丝=Tess, 乌玛=Uma, 薇安=Vivian, 维姆=Wim, 西顿=Sidon, 雅各=Jacob, 泽夫=Zev, 阿芭=Alba,"
    "布鲁=Bruno, 克莱=Clay, 蒂芙=Tiff, 埃文=Evan, 菲比=Phoebe, 古斯=Gus, 哈克=Huck, 伊沃=Ivo, 杰德=Jade, 肯特=Kent,"
    "洛可=Roco, 马克=Mark, 妮可=Nicole, 奥托=Otto, 帕布=Pablo, 丽莎=Lisa, 斯万=Swan, 塔山=Tashan"
)

# relation -> its values; a value belongs to one relation only
VALUES = {
    "town": _pairs(
        "石桥镇=Stonebridge, 月港=Moonport, 松岭=Pinehill, 白沙湾=Whitesand, 枫谷=Maplewood, 星湖=Starlake,"
        "芦溪=Reedbrook, 云台=Cloudrest, 盐井=Saltwell, 金滩=Goldbeach, 雪门=Snowgate, 麦原=Wheatfield,"
        "风崖=Windcliff, 柳河=Willowford, 铜山=Copperhill, 杏村=Plumvale"
    ),
    "job": _pairs(
        "面包师=baker, 医生=doctor, 老师=teacher, 木匠=carpenter, 渔夫=fisher, 铁匠=blacksmith, 画家=painter,"
        "裁缝=tailor, 农夫=farmer, 邮差=postman, 厨师=cook, 歌手=singer, 钟表匠=watchmaker, 园丁=gardener,"
        "船长=captain, 护士=nurse"
    ),
    "pet": _pairs(
        "猫=cat, 狗=dog, 兔子=rabbit, 鹦鹉=parrot, 乌龟=turtle, 山羊=goat, 鸭子=duck, 狐狸=fox, 小鹿=deer,"
        "刺猬=hedgehog, 松鼠=squirrel, 鸽子=pigeon, 孔雀=peacock, 猴子=monkey, 青蛙=frog, 母鸡=hen"
    ),
    "food": _pairs(
        "面条=noodles, 饺子=dumplings, 豆腐=tofu, 米饭=rice, 南瓜汤=pumpkin soup, 烤鱼=grilled fish, 蜂蜜=honey,"
        "奶酪=cheese, 葡萄=grapes, 西瓜=watermelon, 煎饼=pancakes, 核桃=walnuts, 草莓=strawberries, 土豆=potatoes,"
        "玉米=corn, 鸡蛋=eggs"
    ),
    "month": _pairs(
        "1月=January, 2月=February, 3月=March, 4月=April, 5月=May, 6月=June, 7月=July, 8月=August, 9月=September,"
        "10月=October, 11月=November, 12月=December"
    ),
}
RELATIONS = tuple(VALUES)
MONTHS = VALUES["month"]
ANIMALS = VALUES["pet"]

STATEMENTS = {
    "zh": {
        "town": ["{n}住在{v}。", "{n}的家在{v}。", "{v}是{n}居住的地方。", "在{v}，人人都认识{n}。"],
        "job": ["{n}是一名{v}。", "{n}的工作是{v}。", "{n}靠当{v}谋生。", "说起{v}，大家会想到{n}。"],
        "pet": ["{n}养了一只{v}。", "{n}的宠物是一只{v}。", "有一只{v}陪着{n}。", "{n}每天喂自己的{v}。"],
        "food": ["{n}最爱吃{v}。", "{n}最喜欢的食物是{v}。", "有{v}的饭桌让{n}高兴。", "{v}是{n}最爱的美味。"],
        "month": ["{n}的生日在{v}。", "{n}出生在{v}。", "每年{v}都给{n}过生日。", "{v}是{n}出生的月份。"],
    },
    "en": {
        "town": [
            "{n} lives in {v}.",
            "The home of {n} is in {v}.",
            "{v} is where {n} lives.",
            "In {v} everybody knows {n}.",
        ],
        "job": [
            "{n} is a {v}.",
            "{n} works as a {v}.",
            "The job of {n} is {v}.",
            "The town needs a {v}, and {n} is one.",
        ],
        "pet": [
            "{n} keeps a {v}.",
            "The pet of {n} is a {v}.",
            "A {v} follows {n} around.",
            "Each day {n} feeds a {v}.",
        ],
        "food": [
            "{n} likes {v} best.",
            "The favourite food of {n} is {v}.",
            "For dinner {n} always wants {v}.",
            "With {v} on the table, {n} is happy.",
        ],
        "month": [
            "{n} was born in {v}.",
            "The birthday of {n} is in {v}.",
            "Each {v}, {n} has a birthday.",
            "{v} is the month when {n} was born.",
        ],
    },
}

# ten wordings of each question: the last two are asked in the exam only
EXAM_WORDINGS = 2
QUESTIONS = {
    "zh": {
        "town": [
            "{n}住在哪里？",
            "{n}的家在什么地方？",
            "请问{n}住在什么地方？",
            "你知道{n}的家在哪里吗？",
            "请问{n}住在哪里？",
            "告诉我{n}的家在哪里。",
            "你知道{n}住在哪个镇上吗？",
            "请说说{n}的家在什么地方。",
            "告诉我{n}住在哪里。",
            "你知道{n}住在什么地方吗？",
        ],
        "job": [
            "{n}做什么工作？",
            "{n}的工作是什么？",
            "请问{n}是做什么的？",
            "告诉我{n}做什么工作。",
            "{n}是做什么的？",
            "你知道{n}的工作是什么吗？",
            "告诉我{n}的工作是什么。",
            "请说说{n}做什么工作。",
            "请问{n}的工作是什么？",
            "你知道{n}是做什么的吗？",
        ],
        "pet": [
            "{n}养了什么动物？",
            "{n}的宠物是什么？",
            "你知道{n}养了什么宠物吗？",
            "告诉我{n}养了什么动物。",
            "请问{n}的宠物是什么？",
            "告诉我{n}养了什么宠物。",
            "你知道{n}养了什么动物吗？",
            "请说说{n}的宠物是什么。",
            "请问{n}养了什么宠物？",
            "你知道{n}的宠物是什么吗？",
        ],
        "food": [
            "{n}最爱吃什么？",
            "{n}最喜欢的食物是什么？",
            "请问{n}最爱吃什么东西？",
            "你知道{n}最喜欢吃什么吗？",
            "请问{n}最喜欢的食物是什么？",
            "告诉我{n}最爱吃什么。",
            "你知道{n}最爱吃什么吗？",
            "请说说{n}最喜欢吃什么。",
            "告诉我{n}最喜欢的食物是什么。",
            "请问{n}最喜欢吃什么？",
        ],
        "month": [
            "{n}的生日在几月？",
            "{n}是几月出生的？",
            "你知道{n}几月过生日吗？",
            "告诉我{n}的生日在几月。",
            "{n}几月过生日？",
            "请问{n}的生日在几月？",
            "告诉我{n}是几月出生的。",
            "请说说{n}的生日在几月。",
            "请问{n}几月过生日？",
            "你知道{n}是几月出生的吗？",
        ],
    },
    "en": {
        "town": [
            "Where does {n} live?",
            "Where is the home of {n}?",
            "In which town does {n} live?",
            "Do you know where {n} lives?",
            "Tell me where the home of {n} is.",
            "Do you know where the home of {n} is?",
            "Please say where {n} lives.",
            "Which town does {n} live in?",
            "Tell me where {n} lives.",
            "Do you know in which town {n} lives?",
        ],
        "job": [
            "What is the job of {n}?",
            "What does {n} work as?",
            "What work does {n} do?",
            "Tell me what {n} works as.",
            "Do you know the job of {n}?",
            "Tell me what work {n} does.",
            "Please say what {n} works as.",
            "Do you know what {n} works as?",
            "Do you know what work {n} does?",
            "Tell me the job of {n}.",
        ],
        "pet": [
            "What pet does {n} keep?",
            "What is the pet of {n}?",
            "Which animal does {n} keep?",
            "Do you know what pet {n} keeps?",
            "Tell me what pet {n} keeps.",
            "Do you know the pet of {n}?",
            "Please say which animal {n} keeps.",
            "What animal does {n} keep?",
            "Tell me which animal {n} keeps.",
            "Tell me the pet of {n}.",
        ],
        "food": [
            "What food does {n} like best?",
            "What is the favourite food of {n}?",
            "What does {n} like to eat best?",
            "Tell me the favourite food of {n}.",
            "Do you know the favourite food of {n}?",
            "Tell me what {n} likes to eat best.",
            "Please say what food {n} likes best.",
            "Which food does {n} like best?",
            "Do you know what {n} likes to eat best?",
            "Tell me what food {n} likes best.",
        ],
        "month": [
            "In which month was {n} born?",
            "When is the birthday of {n}?",
            "In which month is the birthday of {n}?",
            "Tell me when {n} was born.",
            "Do you know when {n} was born?",
            "Tell me the month when {n} was born.",
            "Please say when the birthday of {n} is.",
            "When was {n} born?",
            "Do you know in which month {n} was born?",
            "Tell me when the birthday of {n} is.",
        ],
    },
}

# passages about people who exist in that passage only: the two parts of a name, in the order of writing
NAME_PARTS = {
    "zh": (
        "岑庄闵沐祁郝阮柯苗邵庞裴鲍戚曾凌樊耿霍虞薛姚潘葛范彭鲁韦俞袁柏窦章费廉",
        "彤亮宁轩琳磊涵峰倩雯骏芸昊婧锋娟凯璐辰瑶栋妍涛颖彬蓉超莹泽欣楠怡浩萱毅",
    ),
    "en": (
        "Adel Bodo Cato Dario Elio Fabio Gino Heidi Igor Jonas Kaspar Leon Mauro Nando Olga Paula Ralf Sonja Tilda "
        "Ulla Vito Wanda Yuri Zora Ada Berta Carlo Doris Egon Frida Greta Hilda Ilse Jutta Kurt".split(),
        "Abbot Barlow Calder Dunn Ellis Foster Gibbs Harper Irving Jarvis Keller Lowell Mercer Norris Osborn Parker "
        "Quill Ramsey Sutton Thorne Upton Vance Walsh Yates Zimmer Barker Cooper Dawson Finch Grant Hobbs Knox Lang "
        "Moss Nash".split(),
    ),
}
COLOURS = _pairs(
    "红色的=red, 蓝色的=blue, 绿色的=green, 黄色的=yellow, 白色的=white, 黑色的=black, 紫色的=purple, 灰色的=grey,"
    "粉色的=pink, 棕色的=brown"
)
THINGS = _pairs(
    "帽子=hat, 杯子=cup, 雨伞=umbrella, 灯笼=lantern, 风筝=kite, 篮子=basket, 手套=glove, 毯子=blanket, 盘子=plate,"
    "椅子=chair, 镜子=mirror, 钥匙=key, 箱子=box, 书包=bag, 茶壶=teapot, 围巾=scarf, 铃铛=bell, 小鼓=drum, 梳子=comb,"
    "笛子=flute"
)
PLACES = _pairs(
    "书店=bookshop, 花店=flower shop, 茶馆=teahouse, 集市=market, 车站=station, 学校=school, 公园=park, 河边=river,"
    "图书馆=library, 码头=harbour, 磨坊=mill, 果园=orchard, 药铺=pharmacy, 广场=square, 钟楼=clock tower, 农场=farm"
)
# what the people of a passage did: (what {v} is, Chinese, English); the sentence is also the answer to what they did
DEEDS = [
    ("thing", "{n}买了{v}。", "{n} bought a {v}."),
    ("thing", "{n}卖了{v}。", "{n} sold a {v}."),
    ("thing", "{n}丢了{v}。", "{n} lost a {v}."),
    ("thing", "{n}借了{v}。", "{n} borrowed a {v}."),
    ("thing", "{n}修了{v}。", "{n} repaired a {v}."),
    ("place", "{n}去了{v}。", "{n} went to the {v}."),
    ("place", "{n}离开了{v}。", "{n} left the {v}."),
    ("place", "{n}打扫了{v}。", "{n} cleaned the {v}."),
    ("coins", "{n}捡到了{v}元。", "{n} found {v} coins."),
    ("coins", "{n}付了{v}元。", "{n} paid {v} coins."),
    ("coins", "{n}存了{v}元。", "{n} saved {v} coins."),
    ("food", "{n}吃了{v}。", "{n} ate {v}."),
    ("food", "{n}做了{v}。", "{n} cooked {v}."),
    ("food", "{n}尝了{v}。", "{n} tasted {v}."),
    ("animal", "{n}看见了一只{v}。", "{n} saw a {v}."),
    ("animal", "{n}喂了一只{v}。", "{n} fed a {v}."),
    ("animal", "{n}画了一只{v}。", "{n} drew a {v}."),
    ("animal", "{n}抱了一只{v}。", "{n} held a {v}."),
]
READING = {
    "zh": ["{n}做了什么？", "请问{n}做了什么事？", "你知道{n}做了什么吗？", "说说{n}做的事。"],
    "en": ["What did {n} do?", "Tell me what {n} did.", "Do you know what {n} did?", "What was it that {n} did?"],
}
RETOLD = {"zh": "也就是说：", "en": "In other words:"}

# {a} and {b} are numbers; every answer to a sum or a difference is the equation itself
SUMS = {
    "+": {
        "zh": [
            "{a}+{b}等于多少？",
            "{a}加{b}是多少？",
            "请计算{a}+{b}。",
            "桌上有{a}个苹果，又放上{b}个，一共多少个？",
            "先走了{a}里路，又走了{b}里，一共走了多少里？",
        ],
        "en": [
            "What is {a}+{b}?",
            "How much is {a} plus {b}?",
            "Please compute {a}+{b}.",
            "There are {a} apples on the table and {b} more are added. How many are there?",
            "We walked {a} miles and then {b} more. How many miles is that?",
        ],
    },
    "-": {
        "zh": [
            "{a}-{b}等于多少？",
            "{a}减{b}是多少？",
            "请计算{a}-{b}。",
            "篮子里有{a}个鸡蛋，拿走{b}个，还剩多少个？",
            "有{a}元钱，花了{b}元，还剩多少元？",
        ],
        "en": [
            "What is {a}-{b}?",
            "How much is {a} minus {b}?",
            "Please compute {a}-{b}.",
            "There are {a} eggs in the basket and {b} are taken out. How many are left?",
            "You have {a} coins and spend {b}. How many are left?",
        ],
    },
}
# {d} is a date, {k} a number of days, {e} the equation and {v} the date it leads to
CALENDAR = {
    "+": {
        "zh": ["今天是{d}，{k}天后是几月几日？", "从{d}再过{k}天是哪一天？", "{d}的{k}天后是几号？"],
        "en": [
            "Today is {d}. What date is it {k} days later?",
            "Which day comes {k} days after {d}?",
            "It is {d} now. What will the date be in {k} days?",
        ],
    },
    "-": {
        "zh": ["今天是{d}，{k}天前是几月几日？", "从{d}往前数{k}天是哪一天？", "{d}的{k}天前是几号？"],
        "en": [
            "Today is {d}. What date was it {k} days earlier?",
            "Which day comes {k} days before {d}?",
            "It is {d} now. What was the date {k} days ago?",
        ],
    },
}
CALENDAR_ANSWER = {"zh": "{e}，是{v}。", "en": "{e}, so it is {v}."}
ORDINALS = _pairs("第一个=first, 第二个=second, 第三个=third, 第四个=fourth, 最后一个=last")
LISTS = {
    "zh": {
        "head": ["清单：\n{l}", "有这些东西：\n{l}", "请看这个清单：\n{l}"],
        "join": "\n",
        "nth": ("{o}是{v}。", ["{o}是什么？", "请问{o}是哪一样？"]),
        "after": ("{x}后面是{v}。", ["{x}后面是什么？", "请问{x}后面是哪一样？"]),
        "reverse": ("倒过来是：\n{v}", ["把它们倒过来说。", "请倒着念一遍。"]),
        "count": ("一共有{v}样。", ["一共有几样？", "数一数有几样。"]),
    },
    "en": {
        "head": ["A list: {l}.", "Here are some things: {l}.", "Please look at this list: {l}."],
        "join": ", ",
        "nth": ("The {o} is {v}.", ["What is the {o}?", "Which one is the {o}?"]),
        "after": ("After {x} comes {v}.", ["What comes after {x}?", "Which one comes after {x}?"]),
        "reverse": ("Backwards: {v}.", ["Say them backwards.", "Please give them in reverse order."]),
        "count": ("There are {v}.", ["How many are there?", "Count them."]),
    },
}
ROLL_CALL = {"zh": ("今天来的人：", "点名："), "en": ("Who is coming:", "Who is here:")}
NUMBERS = _pairs("两=two, 三=three, 四=four, 五=five, 六=six, 七=seven, 八=eight, 九=nine, 十=ten")
PLURALS = {"fox": "foxes", "deer": "deer"}
TRANSLATE = {  # (language of the question, language of the phrase)
    ("zh", "zh"): ["“{p}”用英语怎么说？", "把“{p}”翻译成英语。", "请问“{p}”的英语是什么？"],
    ("zh", "en"): ["“{p}”用中文怎么说？", "把“{p}”翻译成中文。", "请问“{p}”的中文是什么？"],
    ("en", "zh"): ['How do you say "{p}" in English?', 'Translate "{p}" into English.', 'What is "{p}" in English?'],
    ("en", "en"): ['How do you say "{p}" in Chinese?', 'Translate "{p}" into Chinese.', 'What is "{p}" in Chinese?'],
}

# problems of several steps: {e} is the whole chain, the parts are put one after the other
STEPS = {
    "zh": {
        "plain": ["{e}等于多少？", "请算出{e}。", "{e}是多少？"],
        "start": ["篮子里有{a}个苹果", "有{a}元钱"],
        "+": ["，放进{b}个", "，挣了{b}元"],
        "-": ["，拿走{b}个", "，花了{b}元"],
        "end": ["，现在有几个？", "，现在有几元？"],
    },
    "en": {
        "plain": ["What is {e}?", "Please work out {e}.", "How much is {e}?"],
        "start": ["There are {a} apples", "You have {a} coins"],
        "+": [", {b} are put in", ", you get {b}"],
        "-": [", {b} are taken out", ", you spend {b}"],
        "end": [". How many are there now?", ". How many are left?"],
    },
}
