"""The style sheet of the page. Colours are those of the plot (`svg.LIGHT`, `svg.DARK`)."""

from __future__ import annotations

from surgeon.report.svg import FONT

STYLE = (
    """
:root{color-scheme:light dark;--good:#0b6e4f;--bad:#b3261e;--wash:#f5f6f8;--warn:#8a5a00;--warn-wash:#fdf6e3}
@media screen and (prefers-color-scheme:dark){:root{--good:#4cc79b;--bad:#ff8a80;--wash:#1b1f25;--warn:#e8c26a;--warn-wash:#2a2415}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 FONT;font-variant-numeric:tabular-nums}
main{max-width:1112px;margin:0 auto;padding:40px 24px 56px}
h1,h2,h3,p,ol,ul,dl,dd,figure{margin:0;padding:0}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;font-weight:680;overflow-wrap:anywhere}
h2{font-size:20px;line-height:1.3;letter-spacing:-.005em;font-weight:650;margin-bottom:12px}
h3{font-size:15px;font-weight:650;margin:20px 0 8px}
section{margin-top:48px}
.facts{color:var(--muted);margin-top:8px;overflow-wrap:anywhere}
.lead b{font-weight:680}
.lead{font-size:19px;line-height:1.45;margin-top:20px;max-width:46em;overflow-wrap:anywhere}
.verdict{margin-top:16px;font-weight:600}
.verdict a{text-decoration-thickness:1px;text-underline-offset:3px}
.verdict a,.good{color:var(--good)}
.verdict.bad a,.bad{color:var(--bad)}
.note,figcaption{color:var(--muted);font-size:14px;max-width:60em}
.note{margin:-6px 0 16px}
.caution{margin-top:24px;padding:12px 16px;border-left:3px solid var(--warn);background:var(--warn-wash);font-size:15px}
.caution p+p{margin-top:6px}
.front{list-style:none;display:grid;grid-template-columns:repeat(auto-fill,minmax(184px,1fr));gap:16px 24px}
.front>li{border-top:2px solid var(--axis);padding-top:10px;min-width:0}
.front h3{display:flex;gap:4px;align-items:flex-start;margin:0 0 4px -4px;font-size:15px;overflow-wrap:anywhere}
.front .pair{color:var(--muted);font-size:14px;line-height:1.3}
.front .pair b{font-size:24px;font-weight:650;letter-spacing:-.02em;color:var(--ink)}
.front .against{font-size:13px;color:var(--muted);margin:8px 0 2px}
.front ul{font-size:14px;line-height:1.35}
figure svg.plot{display:block;width:100%;height:auto}
figcaption{margin-top:8px}
.narrow{display:none}
svg.glyph{width:20px;height:20px;flex:none;overflow:visible}
table.groups{width:auto;min-width:min(100%,560px)}
.scroll{overflow-x:auto;margin:0 -24px;padding:0 24px}
.scroll:focus-visible{outline:2px solid var(--s1);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:14px;line-height:1.35}
th,td{padding:8px 8px;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}
td{white-space:nowrap}
tbody th small{white-space:nowrap}
thead th{font-weight:550;color:var(--muted);font-size:13px;vertical-align:bottom;border-bottom-color:var(--axis)}
th:first-child,.text{text-align:left}
td.text{white-space:normal;overflow-wrap:anywhere;min-width:10em}
.facts-table td.text:last-child{min-width:18em}
figure+figure,figure+.scroll,.scroll+.plain,figure+.plain{margin-top:20px}
tbody th{font-weight:400;min-width:9em;max-width:22em;overflow-wrap:break-word;padding-left:0}
thead th:first-child{padding-left:0}
tr>:last-child{padding-right:0}
th>div{display:flex;gap:4px;margin-left:-4px}
th>div>span{min-width:0;overflow-wrap:anywhere}
th svg.glyph{margin-top:-1px}
thead th>div{justify-content:flex-end}
.on-front th span,.on-front td:nth-child(2){font-weight:620}
.on-front th small,.on-front td small{font-weight:400}
small{display:block;font-size:12px;color:var(--muted);font-weight:400}
.none,.unclear{color:var(--muted)}
code{font:12.5px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
ul.plain{list-style:none}
ul.plain li+li{margin-top:4px}
td b,ul.plain b{font-weight:600}
.setup{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:0 40px;font-size:14px}
.setup div{display:flex;gap:16px;justify-content:space-between;border-bottom:1px solid var(--grid);padding:5px 0;min-width:0}
.setup .long{grid-column:1/-1;justify-content:flex-start}
.setup dt,.terms dt{color:var(--muted);flex:none;max-width:65%;overflow-wrap:anywhere}
.setup dd{text-align:right;overflow-wrap:anywhere;min-width:0}
.setup .long dt{width:11em}
.setup .long dd{text-align:left}
.terms{font-size:14px}
.terms div{display:flex;gap:16px;padding:3px 0}
.terms dt{width:15em}
footer{margin-top:56px;padding-top:16px;border-top:1px solid var(--grid);color:var(--muted);font-size:13px;max-width:none}
@media (max-width:620px){
main{padding:24px 16px 40px}
h1{font-size:24px}
.lead{font-size:17px}
section{margin-top:36px}
.front{grid-template-columns:1fr 1fr;gap:16px}
.wide{display:none}.narrow{display:block}
.scroll{margin:0 -16px;padding:0}
.scroll th:first-child{padding-left:16px}
.scroll tr>:last-child{padding-right:16px}
.models th:first-child{position:sticky;left:0;background:var(--paper);max-width:10em;z-index:1}
.setup{grid-template-columns:1fr}
.terms div,.setup .long{display:block}
.terms dt,.terms dd{max-width:none;width:auto}
}
@media print{
@page{size:A4;margin:14mm}
body{font-size:10pt}
main{max-width:none;padding:0}
h1{font-size:18pt}h2{font-size:13pt;break-after:avoid}
section{margin-top:16pt}
.lead{font-size:11pt}
.front>li,figure,tr,.caution{break-inside:avoid}
thead{display:table-header-group}
.wide{display:block}.narrow{display:none}
.scroll{overflow:visible;margin:0;padding:0}
table{font-size:7.5pt}
thead th{font-size:7pt}
.note,figcaption,.setup,.terms,footer{font-size:8.5pt}
.front .pair b{font-size:14pt}
th,td{padding:3pt 4pt}
td{white-space:normal}
table small{font-size:6.5pt}
.front{grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:12pt}
.front li,.front .pair{font-size:8.5pt}
.front h3{font-size:10pt}
.front small,.front .against{font-size:7.5pt}
.caution{font-size:9pt}
code{font-size:6.5pt}
td.text,.facts-table td.text:last-child{min-width:0}
.caution{border:1px solid var(--warn);border-left-width:3px}
}
""".replace("FONT", FONT)
    .replace("\n", "")
    .strip()
)
