"""One sentence per figure, for people new to the subject."""

ABOUT: dict[str, str] = {
    "chain": "A residual network is a straight line, the shortcut, along which the data flow unchanged; "
    "each box is a branch that leaves the line, computes something and is added back. A taller "
    "box has more parameters.",
    "speed": "Time for one pass through the network: as it is, with half of its branches closed, and "
    "with the same branches taken out for good. Shorter bars are faster.",
    "training": "First, how many test images the network gets wrong as it learns; then, how many branches its "
    "gate has muted by then, because everything they compute stays within the threshold ε.",
    "lesion_each": "Each point is the same trained network with one block deleted, and nothing retrained. "
    "With shortcuts the data have a way around the gap; without them the network is cut in two.",
    "lesion_random": "Each dot is the trained network after deleting that many blocks picked at random. The "
    "error rises little by little, as in a group that loses members one at a time.",
    "lesion_parts": "What the model loses when one branch is closed, block after block. A branch near zero is one it "
    "can do without; the bars are means over the blocks of one stage and kind.",
    "lesion_many": "The trained model with more and more blocks closed. The best order closes, each time, the block "
    "that is missed least with those closed before; at random shows what luck alone gives.",
    "lesion_order": "Layers of the trained model change places. The further their order is from the original one, the "
    "worse the model: but it degrades little by little, as if most layers did not mind where they stand.",
    "lesion_pairs": "Each square is a pair of blocks closed together. White: it costs what closing each costs, added "
    "up, so the two do not depend on each other. Orange: together it is worse than that. Blue: it is less bad.",
    "lesion_paths": "A few branches of the trained model are left open, all others are closed. Several such parts "
    "together, their probabilities averaged, do better than one alone, as members of a committee would.",
    "removal": "The same net trained in several ways, then tested with more and more of its blocks taken out and "
    "nothing retrained. A curve that stays low longer belongs to a net that can do with fewer blocks.",
    "path_lengths": "At every block the data can go through the branch or past it, so a network contains one "
    "path for each combination. This is how many branches those paths pass.",
    "gradients": "What the paths of each length contribute to learning. Blue: the gradients of all paths of "
    "one length added up, computed exactly. Green: the sizes of the single gradients added up, estimated from "
    "samples.",
    "gradients_by_moment": "The same net at several moments of its training: which part of the gradient comes along "
    "paths of each length. A curve further left belongs to a net whose learning is driven by shorter paths.",
    "block_gradients": "Take the gradient that arrives at the beginning of the network apart, block by block: the part "
    "that came through the block's branch, and the part that came past it along the shortcut.",
    "response": "The largest value that each branch still adds after training. A branch at or below the "
    "threshold ε is muted: it adds nothing, so it can be cut out without changing the network.",
    "table_latency": "Measured time for one pass. The nets took turns, so that a busy moment of the machine "
    "slows all of them alike.",
    "unit_maps": "Every input is a point of the plane. Each square is a map of it that shows where one unit of one "
    "branch responds, and with which sign. Squares that look alike are units that say the same.",
    "unit_similarity": "Bright: for every unit of one block there is one in the other block that responds alike, or "
    "just the other way round. Without learning units are alike too, because all blocks read one and the same stream.",
    "block_response": "A branch adds to the shortcut: here is how much, in which direction, and whether what it adds "
    "points downhill, where the loss falls. Small branches only refine what is there already.",
    "angular_distance": "How far the stream has turned between two depths. Blocks in a row that hardly turn it are "
    "those that language models were found to do without.",
    "cka": "How alike what the network knows is at two depths, whatever the coordinates it is written in. Bright: the "
    "blocks between them changed little.",
    "probes": "At every depth a simple linear classifier was trained on what the stream holds there. Where the curve "
    "rises, blocks make the classes easier to tell apart.",
    "strict_identity": "The largest value that each branch adds, sample by sample. A block whose samples all stay "
    "within ε does nothing once gated: it is exactly its shortcut.",
    "gate_closed": "The gate looks at whole batches: one large response among all samples opens it. So the same block "
    "may be closed on small batches and open on large ones.",
    "cut_trade": "Blocks are cut out of the trained net one after the other, and nothing is retrained. Every point is "
    "a net: further left is faster, lower is fewer mistakes. A good choice stays low for longer than chance.",
    "cut_classes": "One line per class of images: how often the whole net is wrong on it, and how often the cut one. "
    "A cut that is harmless on average may still hurt one class.",
    "cut_latency": "Measured time for one pass through the whole net and the cut one, which took turns. Shorter bars "
    "are faster; an eager net runs as written, a compiled or exported one after a translation.",
}
